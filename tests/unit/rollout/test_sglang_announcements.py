"""Announcements are written whole and believed only when everything in them is as it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_urlvr.config.addresses import address_problem, key_problem
from megatron_urlvr.rollout.announcements import Announcement, announce, read_announcements, withdraw

HOSTS = ["127.0.0.1"]
GOOD = Announcement("policy-a-0", "http://127.0.0.1:31000", "policy", 12, "2026-01-01T00:00:00")


def test_what_is_announced_is_read_until_it_is_withdrawn(tmp_path: Path) -> None:
    announce(tmp_path, GOOD)
    assert read_announcements(tmp_path, HOSTS) == ([GOOD], [])
    withdraw(tmp_path, GOOD.id)
    withdraw(tmp_path, GOOD.id)
    assert read_announcements(tmp_path, HOSTS) == ([], [])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"url": "http://10.0.0.7:31000"}, "host '10.0.0.7' is not among servers.hosts"),
        ({"url": "ftp://127.0.0.1:31000"}, "allowed: http, https"),
        ({"url": "http://127.0.0.1"}, "give http://host:port"),
        ({"url": "http://127.0.0.1:99999"}, "give http://host:port"),
        ({"url": "http://me:pw@127.0.0.1:31000"}, "without user, path or query"),
        ({"url": "http://127.0.0.1:31000/admin"}, "without user, path or query"),
        ({"url": 31000}, "is not of type str"),
        ({"pid": "12"}, "is not of type int"),
        ({"pid": True}, "is not of type int"),
        ({"tp": 0}, "is not positive"),
        ({"id": "another"}, "is not the name of the file"),
        ({"surprise": 1}, "its keys must be"),
    ],
)
def test_an_announcement_that_is_not_as_it_must_be_is_refused_in_a_sentence(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    path = announce(tmp_path, GOOD)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found, problems = read_announcements(tmp_path, HOSTS)
    assert found == []
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_a_file_that_is_no_announcement_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    found, problems = read_announcements(tmp_path, HOSTS)
    assert (found, len(problems)) == ([], 1)


def test_a_host_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEY", raising=False)
    assert key_problem("127.0.0.1", "KEY") is None
    assert key_problem("localhost", "KEY") is None
    assert "KEY" in (key_problem("0.0.0.0", "KEY") or "")
    monkeypatch.setenv("KEY", "k")
    assert key_problem("node7", "KEY") is None


def test_an_ipv6_address_is_as_good() -> None:
    assert address_problem("http://[::1]:31000", ["::1"]) is None

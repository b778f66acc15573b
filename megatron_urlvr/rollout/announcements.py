"""How servers make themselves known: one JSON file each in `<run>/servers/`, written whole, checked when read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config.addresses import address_problem
from ..run.folder import write_json

ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True)
class Announcement:
    """A server that is ready, as its supervisor describes it."""

    id: str
    url: str
    pool: str
    pid: int
    """Process group of the server on its host."""
    started: str
    """When this process was started: a server that comes back is another one."""
    tp: int = 1
    torch: str = ""
    cuda: str = ""
    nccl: str = ""


class BadAnnouncement(ValueError):  # noqa: N818 - says what it is
    """A file in the folder of servers that cannot be trusted. The message is a sentence."""


def announce(folder: Path, announcement: Announcement) -> Path:
    """Write `<id>.json` in one step: readers see the whole of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{announcement.id}.json"
    write_json(path, asdict(announcement))
    return path


def withdraw(folder: Path, server: str) -> None:
    """The server is not to be asked any more."""
    (folder / f"{server}.json").unlink(missing_ok=True)


def read_announcements(folder: Path, hosts: Sequence[str]) -> tuple[list[Announcement], list[str]]:
    """(Announcements in order of their ids, one sentence for each file that is not one)."""
    found, problems = [], []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            found.append(read_announcement(path, hosts))
        except FileNotFoundError:
            continue  # withdrawn between the listing and now
        except BadAnnouncement as problem:
            problems.append(str(problem))
    return found, problems


def read_announcement(path: Path, hosts: Sequence[str]) -> Announcement:
    """The announcement in `path`. BadAnnouncement when anything in it is not as it must be."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise BadAnnouncement(f"{path} is not JSON ({error}); remove it") from error
    kinds = {"pid": int, "tp": int} | dict.fromkeys(("id", "url", "pool", "started", "torch", "cuda", "nccl"), str)
    if not isinstance(fields, dict) or set(fields) != set(kinds):
        raise BadAnnouncement(f"{path} does not announce a server: its keys must be {', '.join(sorted(kinds))}")
    for name, kind in kinds.items():
        if type(fields[name]) is not kind:
            raise BadAnnouncement(f"{path}: {name} = {fields[name]!r} is not of type {kind.__name__}")
    if fields["id"] != path.stem or not ID.fullmatch(fields["id"]):
        raise BadAnnouncement(f"{path}: id = {fields['id']!r} is not the name of the file")
    if fields["tp"] < 1:
        raise BadAnnouncement(f"{path}: tp = {fields['tp']} is not positive")
    if problem := address_problem(fields["url"], hosts):
        raise BadAnnouncement(f"{path}: url = {fields['url']!r} is refused: {problem}")
    return Announcement(**fields)

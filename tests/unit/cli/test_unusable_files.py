"""Files that are not what a command expects: a sentence that names them, exit code 2, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_urlvr.run.folder import RunDir

BINARY = b"\xff\xfe\x00bad\x80"


def damaged(run: RunDir, file: str, content: bytes | None) -> Path:
    """The run's folder with `content` in `file`, or a folder in its place."""
    path = run.path / file
    path.unlink(missing_ok=True)
    path.mkdir(parents=True) if content is None else path.write_bytes(content)
    return run.path


@pytest.mark.parametrize("command", ["report", "collapse"])
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.yaml", BINARY, "is no text"),
        ("config.yaml", b"- 1\n", "holds no settings"),
        ("metrics.jsonl", BINARY, "is no text"),
        ("metrics.jsonl", None, "Is a directory"),
        ("metrics.jsonl", b"[]\n", "line 1 is no JSON object: it is a list"),
        ("metrics.jsonl", b'{"step": "one"}\n', "step is 'one'"),
        ("metrics.jsonl", b'{"step": 1, "reward/proxy": "high"}\n', "reward/proxy = 'high' is no number"),
        ("status.json", b"[]", "status.json is no readable JSON: it is a list"),
        ("status.json", BINARY, "is no text"),
    ],
)
def test_a_run_with_a_damaged_file_is_refused_by_the_files_name(urlvr, run, command, file, content, said):
    outcome = urlvr(command, damaged(run, file, content))
    assert outcome.code == 2
    assert f"{run.path}/{file}" in outcome.err
    assert said in outcome.err


@pytest.mark.parametrize("content", [BINARY, b"{}\n", b'{"id": "a", "avg": "high"}\n', b"[]\n", b""])
def test_compare_refuses_what_is_no_table_of_problems(urlvr, tmp_path, content):
    (tmp_path / "table").write_bytes(content)
    outcome = urlvr("compare", tmp_path / "table", tmp_path / "table")
    assert outcome.code == 2
    assert str(tmp_path / "table") in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("file", "content"),
    [("rollouts/step_000004.jsonl.zst", b"garbage"), ("samples/step_000010.jsonl", b'{"prompt": "12="}\n')],
)
def test_samples_refuses_a_damaged_file(urlvr, run, file, content):
    step = int(file.split("_")[1][:6])
    outcome = urlvr("samples", damaged(run, file, content), "--step", step)
    assert outcome.code == 2
    assert file in outcome.err


@pytest.mark.parametrize("command", [("report",), ("collapse",), ("theory", "--steps", "2")])
def test_results_that_cannot_be_written_are_said_not_to_be(urlvr, run, tmp_path, command):
    (tmp_path / "file").touch()
    arguments = [command[0], *([run.path] if command[0] != "theory" else []), *command[1:]]
    outcome = urlvr(*arguments, "--out", tmp_path / "file" / "out.json")
    assert outcome.code == 2
    assert f"--out {tmp_path / 'file' / 'out.json'} cannot be written" in outcome.err


def test_data_select_looks_at_its_output_before_it_samples(urlvr, config_file, tmp_path):
    outcome = urlvr("data", "select", config_file, "--out", tmp_path)
    assert outcome.code == 2
    assert f"--out {tmp_path} is a folder" in outcome.err

"""Formats of the input: byte order marks, UTF-16, NULs, bad lines first and later, and arguments that begin with a minus."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any

import pytest
from lab import Farm, Program

BOM = b"\xef\xbb\xbf"
BAD = [b"{bad", b"NaN", b"[1, Infinity]", b"1 2", b"'one'", b'"\xff"', b"1,", b"[" * 100_000, b"1\x002"]


def run(farm: Farm, content: bytes, *options: object, stream: bool = False) -> Program:
    """Run a job with this tasks file, or stream, to its end; the function returns the task."""
    (farm.folder / "same.py").write_text("def same(task):\n    return task\n")
    (farm.folder / "tasks").write_bytes(content)
    where = ["--results", "results.jsonl", "--workers", 1, "--function", "same:same", *options]
    with (farm.folder / "tasks").open("rb") as file:
        master = farm.master("--tasks", "-" if stream else "tasks", *where, stdin=file)
        master.wait()
    return master


def records(farm: Farm) -> list[dict[str, Any]]:
    """In the order of the ids, which have to be 0, 1, 2..."""
    found = sorted(farm.records(), key=lambda record: record["id"])
    assert [record["id"] for record in found] == list(range(len(found)))
    return found


def check_refused(farm: Farm, master: Program, pattern: str) -> None:
    """Exit status 2, one line that says why, and nothing was done."""
    assert master.wait() == 2, master.stderr
    assert len([line for line in master.stderr if re.search(pattern, line, re.IGNORECASE)]) == 1, master.stderr
    assert "Traceback" not in "\n".join(master.stderr)
    assert not (farm.folder / "results.jsonl").exists()


@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
@pytest.mark.parametrize(
    ("options", "content", "tasks"),
    [
        ([], BOM + b"1\r\n2\n", [1, 2]),
        ([], BOM, []),
        ([], BOM + b"\n\n1\n", [1]),
        (["--text"], BOM + b"a\nb\n", ["a", "b"]),
        (["-0"], BOM + b"a\0b", ["a", "b"]),
        (["--text"], b"a\n" + BOM + b"b", ["a", "\ufeffb"]),
    ],
)
def test_a_byte_order_mark_at_the_start_is_skipped(
    farm: Farm, options: list[str], content: bytes, tasks: list[Any], stream: bool
) -> None:
    master = run(farm, content, *options, stream=stream)
    assert master.wait() == 0, master.stderr
    assert [record["result"] for record in records(farm)] == tasks


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("options", [[], ["--text"]], ids=["JSON", "text"])
@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_utf_16_is_refused_by_name(farm: Farm, encoding: str, options: list[str], stream: bool) -> None:
    check_refused(farm, run(farm, "1\n2\n".encode(encoding), *options, stream=stream), "utf-16")


@pytest.mark.parametrize("option", ["-0", "--null"])
def test_a_task_may_end_with_a_nul_and_hold_anything_else(farm: Farm, option: str) -> None:
    names = ["two\nlines", " a b ", "-n", '{"a": 1}', "1", "\r", "ü", os.fsdecode(b"\xff")]
    master = run(farm, b"\0".join(map(os.fsencode, names)) + b"\0\0\0last", option)
    assert master.wait() == 0, master.stderr
    assert [record["result"] for record in records(farm)] == [*names, "last"]


def test_find_print0_and_null_fit_each_other(farm: Farm) -> None:
    (farm.folder / "files").mkdir()
    for name in ("a\nb", "c d", "e"):
        (farm.folder / "files" / name).write_text(name)
    found = subprocess.run(["find", "files", "-type", "f", "-print0"], cwd=farm.folder, capture_output=True, check=True).stdout
    assert run(farm, found, "-0", stream=True).wait() == 0
    assert sorted(record["result"] for record in records(farm)) == ["files/a\nb", "files/c d", "files/e"]
    (farm.folder / "results.jsonl").unlink()
    check_refused(farm, run(farm, found, "--text", stream=True), "-0|--null")


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad[:15]))
@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_a_first_line_that_is_bad_means_another_format_and_nothing_is_done(farm: Farm, bad: bytes, stream: bool) -> None:
    check_refused(farm, run(farm, b"\n" + bad + b"\n1\n2\n", stream=stream), r"(tasks|standard input).*line 2|utf-16")


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad[:15]))
@pytest.mark.parametrize("end", [b"\n", b"\n\n3\n", b""], ids=["last", "in the middle", "without an end"])
def test_a_later_line_that_is_bad_is_a_task_that_failed_and_the_job_goes_on(farm: Farm, bad: bytes, end: bytes) -> None:
    master = run(farm, b"1\n" + bad + end, "--retries", 2)
    assert master.wait() == 1, master.stderr
    first, failed, *rest = records(farm)
    assert [record["result"] for record in (first, *rest)] == ([1, 3] if b"3" in end else [1])
    assert failed["task"] == bad.decode("utf-8", "surrogateescape") or not bad.isascii()
    assert isinstance(failed["task"], str)
    assert failed["error"]["type"] and failed["error"]["message"]
    assert any("task 1" in line or "line 2" in line for line in master.stderr)
    assert "Traceback" not in "\n".join(master.stderr)


def test_a_bad_line_does_not_stop_a_live_queue(farm: Farm) -> None:
    master = farm.master("--tasks", "-", "--results", "-", "--workers", 1, stdin=subprocess.PIPE, bufsize=0)
    assert master.process.stdin
    with master.process.stdin as pipe:
        for number, line in enumerate([b"1\n", b"{bad\n", b"3\n"]):
            pipe.write(line)
            record = json.loads(master.wait_line(f'"id": {number},', "stdout").string)
            assert ("error" in record) == (number == 1)
        assert master.process.poll() is None
    assert master.wait() == 1


def test_a_job_with_a_bad_line_is_resumed(farm: Farm) -> None:
    assert run(farm, b"1\n{bad\n3\n").wait() == 1
    assert run(farm, b"1\n{bad\n3\n", "--resume").wait() == 1
    assert ["error" in record for record in records(farm)] == [False, True, False]


@pytest.mark.parametrize("number", ["-1e5", "-1E-5", "-5", "-0.5"])
def test_a_negative_number_is_a_task_or_the_error_says_how(farm: Farm, number: str) -> None:
    master = farm.master("--workers", 1, "--results", "results.jsonl", number)
    if master.wait() == 2:
        assert re.search(r"(^|[ `'(])--[ `'),]", master.stderr[-1]), master.stderr
        master = farm.master("--workers", 1, "--results", "results.jsonl", "--", number)
    assert master.wait() == 0, master.stderr
    assert [record["task"] for record in records(farm)] == [json.loads(number)]

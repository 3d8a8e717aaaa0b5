"""--resume: what it needs, what it says, and results files that others wrote, reordered, tore or filled with strange ids."""

from __future__ import annotations

import json
import math
import re
import subprocess
from typing import Any

import pytest
from lab import Farm, Program, check_one_line, check_silence

COUNT = 10
FAILED = 7
MEMORY = 1 << 30  # bytes of addresses that a master may use
LIMITED = f"resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))"
FILE = ["--results", "results.jsonl"]
WORK = ["--workers", 1, "--function", "functions:mendable"]


def record(n: int, **more: Any) -> str:
    what = {"error": {"type": "ValueError", "message": str(n), "traceback": ""}} if n == FAILED else {"result": 2 * n}
    whole = {"id": n, "task": n, **what, "started_at": 1764115200.123, "seconds": 0.1, "worker": "host/1", "attempts": 1}
    return json.dumps({**whole, **more})


def resume(farm: Farm, *options: object, tasks: object = "tasks.jsonl", **more: Any) -> Program:
    """A master that resumes the job with a worker of its own, or is refused; in little memory."""
    farm.write_tasks(range(COUNT))
    where = ["--port", 0, "--tasks", tasks, *FILE, "--resume", *WORK]
    return farm.run_after(LIMITED, "task_master.py", *where, *options, **more)


def check_complete(farm: Farm, kept: set[int], may_be_kept: frozenset[int] = frozenset()) -> None:
    """Each task has one record, the right one; none of `kept` was started."""
    lines = farm.results.read_text().replace(DEEP, "0").splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    assert len(lines) == len(records) == COUNT
    assert all(record["task"] == n and record["result"] == 2 * n for n, record in records.items())
    started = {*map(int, farm.started())}
    assert len(started) == len(farm.started())
    assert started == {*range(COUNT)} - kept - (may_be_kept - started)


@pytest.mark.parametrize(("workers", "content"), [([], None), (["--workers", 1], ""), (WORK, "records")])
def test_resuming_without_the_tasks_is_refused(farm: Farm, workers: list[object], content: str | None) -> None:
    text = "".join(record(n) + "\n" for n in range(5)) if content else content
    if text is not None:
        farm.results.write_text(text)
    check_one_line(farm.master(*FILE, "--resume", *workers), 2, "--resume", "task")
    assert (farm.results.read_text() if farm.results.exists() else None) == text


def fill(line: str, **options: Any) -> str:
    """A record with all members that any has."""
    names = ("id", "task", "result", "error", "started_at", "seconds", "worker", "attempts")
    return json.dumps({name: json.loads(line).get(name) for name in names}, **options) + "\n"


def turn(line: str) -> str:
    """A record with its error at the end, as of a table in which a later row has brought it, and a result that is NaN."""
    record = json.loads(fill(line))
    error = record.pop("error")
    return json.dumps({**record, "result": math.nan if error else record["result"], "error": error}) + "\n"


def shuffle(line: str) -> str:
    return json.dumps(dict(reversed(json.loads(line).items()))) + "\n"


DEEP = "[" * 5000 + "]" * 5000
REWRITTEN = {
    "a whole line without its end": lambda text: text[:-1],
    "as jq -c does": lambda text: "".join(json.dumps(json.loads(t), separators=(",", ":")) + "\n" for t in text.splitlines()),
    "as pandas does": lambda text: "".join(fill(line, separators=(",", ":")) for line in text.splitlines()),
    "with NaN": lambda text: "".join(fill(line) for line in text.splitlines()).replace(": null", ": NaN"),
    "the error at the end": lambda text: "".join(turn(line) for line in text.splitlines()),
    "all members": lambda text: "".join(fill(line) for line in text.splitlines()),
    "other order": lambda text: "".join(shuffle(line) for line in text.splitlines()),
    "more members": lambda text: text.replace('"id"', '"note": {"id": -1, "task": [1], "error": 1}, "id"'),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "zeros behind a torn line": lambda text: text + record(8)[:30] + "\0" * 5000,
    "a torn line": lambda text: text + record(8)[:-1],
    "twice the member": lambda text: text.replace('"id"', '"id": 99, "id"'),
    "no other members": lambda text: re.sub(r', "started_at".*', "}", text),
    "lines in reverse": lambda text: "".join(line + "\n" for line in reversed(text.splitlines())),
    "BOM": lambda text: "\ufeff" + text,
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "letters as they are": lambda text: text.replace("host", "höst ☃"),
    "zeros before a torn line": lambda text: text + "\0" * 50 + record(8)[:30],
    "zeros behind": lambda text: text + "\0" * 5000,
    "zeros, and a line behind them": lambda text: text + record(8)[:30] + "\0" * 50 + "\n" + record(8) + "\n",
    "two records on a line": lambda text: text[:-1] + record(8) + "\n",
    "nested deeply": lambda text: text + record(8, note=0).replace('"note": 0', f'"note": {DEEP}') + "\n",
    "a very long line": lambda text: text + record(8, worker="x" * 5_000_000) + "\n",
    "another text, torn": lambda text: text + "these are my results",
    "JSON of another kind": lambda text: text + '{"name": "precious"}',
    "JSON of another kind, with an id": lambda text: text + '{"id": 8, "name": "precious"}',
    "zeros, and another text": lambda text: text + "\0" * 5000 + "precious",
    "another text": lambda text: text + "these are my results\n",
    "UTF-16": lambda text: text.encode("utf-16"),
    "gzip": lambda text: b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(range(256)) * 10,
}
MUST_BE_RESUMED = list(REWRITTEN)[:11]
MUST_BE_REFUSED = list(REWRITTEN)[-7:]
IDS: list[Any] = [10**18, 10**30, -1, True, None, 1.5, "1", [1], {}, 1e300, 2**31, 2**63]


@pytest.mark.parametrize("kind", REWRITTEN)
def test_a_file_that_was_rewritten_is_resumed_rightly_or_refused_with_a_remedy(farm: Farm, kind: str) -> None:
    text = REWRITTEN[kind]("".join(record(n) + "\n" for n in (0, 1, 5, FAILED)))
    before = text if isinstance(text, bytes) else text.encode()
    farm.results.write_bytes(before)
    farm.mend()
    master = resume(farm)
    if kind in MUST_BE_REFUSED or (master.wait() == 2 and kind not in MUST_BE_RESUMED):
        check_one_line(master, 2, r"results\.jsonl", "[:;(,]")
        assert farm.results.read_bytes() == before
        assert farm.started() == []
    else:
        assert master.wait() == 0, master.stderr
        check_complete(farm, {0, 1, 5}, frozenset({8}))


ZEROS = record(1).replace('"started_at": 1', '"started_at": ' + "\0" * 20)  # as a power cut may leave it


@pytest.mark.parametrize("line", [*(record(1, id=task_id) for task_id in IDS), "not a record", "[]", "{}", "\0" * 100, ZEROS])
def test_a_line_that_is_no_record_is_refused_and_named_and_costs_no_memory(farm: Farm, line: str) -> None:
    before = "".join(f"{text}\n" for text in (record(0), line, record(1)))
    farm.results.write_text(before)
    check_one_line(resume(farm), 2, r"results\.jsonl, line 2: .*mend or remove")
    assert farm.results.read_text() == before
    assert farm.started() == []


def test_a_record_of_another_task_that_failed_is_refused_before_anything_is_appended(farm: Farm) -> None:
    failed = record(0).replace('"result": 0', '"error": {"type": "E", "message": "m", "traceback": ""}')
    before = f"{failed}\n{record(1)}\n"
    farm.results.write_text(before)
    master = resume(farm, tasks="-", stdin=subprocess.PIPE)
    master.give([9, 1])
    assert master.wait() == 2
    assert master.said("belongs to other tasks: its task 0 is not 9")
    assert farm.results.read_text() == before


def test_a_task_that_failed_and_is_not_there_any_more_is_no_success(farm: Farm) -> None:
    farm.results.write_text("".join(f"{record(n)}\n" for n in range(FAILED + 1)))
    fewer = farm.write_tasks(range(FAILED), "fewer.jsonl")
    check_one_line(resume(farm, tasks=fewer), 2, f"belongs to other tasks: the input has only {FAILED}")


def test_the_last_record_of_an_id_counts(farm: Farm) -> None:
    failed = record(5).replace('"result": 10', '"error": {"type": "E", "message": "m", "traceback": ""}')
    mended = record(7).replace('"error": {"type": "ValueError", "message": "7", "traceback": ""}', '"result": 14')
    lines = [record(0), record(7), record(5), record(0), mended, failed]
    farm.results.write_text("".join(f"{line}\n" for line in lines))
    farm.mend()
    assert resume(farm).wait() == 0
    check_complete(farm, kept={0, 7})


@pytest.mark.parametrize("depth", [10, 100, 400, 900, 5000])
def test_a_record_nested_as_deeply_as_a_task_may_be_is_resumed(farm: Farm, depth: int) -> None:
    task = "[" * depth + "]" * depth
    farm.write("tasks.jsonl", f"0\n{task}\n")
    options = ["--tasks", "tasks.jsonl", *FILE, "--workers", 1, "--function", "builtins:bool"]
    status = farm.master(*options).wait()
    assert status in (0, 1)  # 1: this is too deep for a task, and its record says so
    before = farm.results.read_bytes().splitlines()
    master = farm.run_master(*options, "--resume", status=status)
    check_silence(master)
    after = farm.results.read_bytes().splitlines()
    assert len(before) == len(after) == 2
    assert status == 1 or sorted(before) == sorted(after)

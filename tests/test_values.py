"""What is in a record: results of numpy and others, NaN as null, errors that name type and place, true times and counts."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
import sys
import time
from typing import Any

import pytest
from lab import Farm, Program

import task_worker

MODULE = """
import array, collections, datetime, enum, math, os
from functions import nap
try:
    import numpy as np
except ImportError:
    np = None

class Listed:
    def __init__(self, value): self.value = value
    def tolist(self): return self.value

class Addict(dict):
    def __getattr__(self, name): return self.get(name, Addict())

class Broken:
    def tolist(self): raise KeyError("broken")

class Awaited:
    def __await__(self): yield

class Endless:
    def tolist(self): return self

Point = collections.namedtuple("Point", "x y")
Level = enum.IntEnum("Level", "LOW HIGH")
day = datetime.date(2025, 1, 2)
circle = []
circle.append(circle)

def value(text):
    return eval(text)

def double(n):
    if n % 3 == 0:
        raise ValueError(n)
    return 2 * n

def once(n):
    if not os.path.exists(f"again-{n}"):
        open(f"again-{n}", "w").close()
        raise ValueError(n)
    return n
"""


def run(farm: Farm, function: str, tasks: list[Any], *options: object, status: int = 0) -> tuple[list[dict[str, Any]], Program]:
    """Run a job of one local process; returns the records in the order of the tasks, and the master, which has ended."""
    tasks_file = farm.write_tasks(tasks)
    master = farm.run_job("--tasks", tasks_file, *options, function=f"mod:{function}", status=status)
    return farm.in_order(), master


PLAIN = {
    "math.nan": None,
    "[math.inf, {'a': (-math.inf, 1.5)}]": [None, {"a": [None, 1.5]}],
    "Listed([1, math.nan])": [1, None],
    "{'a': [Listed(Listed({'b': Listed(2)}))]}": {"a": [{"b": 2}]},
    "array.array('d', [1, math.nan])": [1.0, None],
    "Point(1, math.nan)": [1, None],
    "[Level.HIGH, True, None]": [2, True, None],
    "collections.OrderedDict(a=Listed(math.inf))": {"a": None},
    "'NaN, Infinity'": "NaN, Infinity",
    "'\"[{\\\\' * 700_000": '"[{\\' * 700_000,
    "Addict(a=[1, math.nan])": {"a": [1, None]},
    "{'NaN': [1e308 * 10, -0.0]}": {"NaN": [None, -0.0]},
    "[10 ** 30, 1e300]": [10**30, 1e300],
    "[{math.nan: 1, 2: 3}]": [{"null": 1, "2": 3}],
    "[{-math.inf: 1, 0: 2, math.inf: 3}]": [{"-Infinity": 1, "0": 2, "Infinity": 3}],
}
NUMPY = {
    "np.float64(1.5)": 1.5,
    "np.float32(0.5)": 0.5,
    "np.int64(7)": 7,
    "np.bool_(True)": True,
    "np.str_('x')": "x",
    "np.array([[1, 2], [3, 4]])": [[1, 2], [3, 4]],
    "np.array(5)": 5,
    "np.array([1, np.nan, np.inf])": [1.0, None, None],
    "np.float64('nan')": None,
    "{'mean': np.float32('inf'), 'rows': [np.arange(3), (np.int8(1), 'x')]}": {"mean": None, "rows": [[0, 1, 2], [1, "x"]]},
    "np.array([], dtype=float)": [],
    "dict(zip(*np.unique(np.array([3, 1, 3]), return_counts=True)))": {"1": 1, "3": 2},
    "{np.float64('nan'): math.nan, np.str_('a'): 1}": {"null": None, "a": 1},
}
REFUSED = {
    "day": ("result", "datetime.date"),
    "[[], [{'x y': {1, 2}}]]": ('result[1][0]["x y"]', "set"),
    "(1, b'x')": ("result[1]", "bytes"),
    "Listed([1, day])": ("[1]", "datetime.date"),
    "[math.nan, 1j]": ("result[1]", "complex"),
    "{(1, 2): 3}": ("result", "tuple"),
    "{'np': [0, np.array([1, day])]}": ('result["np"][1]', "datetime.date"),
    "np.datetime64('2025-01-02')": ("result", "datetime"),
    "np.array([1j])": ("result", "complex"),
    "{np.datetime64('2025-01-02'): 1}": ("result", "datetime"),
    "Awaited()": ("result is a mod.Awaited",),
    "np.array([1], dtype=np.longdouble)": ("result[0]", "longdouble"),
}


@pytest.mark.parametrize("values", [PLAIN, NUMPY], ids=["plain", "numpy"])
def test_whatever_has_tolist_is_a_result_and_nan_is_null(farm: Farm, values: dict[str, Any]) -> None:
    if values is NUMPY:
        pytest.importorskip("numpy")
    records, _ = run(farm, "value", list(values))
    assert {record["task"]: record["result"] for record in records} == values


def test_another_result_is_an_error_that_names_type_and_place_and_is_not_retried(farm: Farm) -> None:
    tasks = [text for text in REFUSED if "np." not in text or importlib.util.find_spec("numpy")]
    (*refused, good), _ = run(farm, "value", [*tasks, "1"], "--retries", 3, status=1)
    for record in refused:
        assert record["error"]["type"] == "TypeError", record
        assert all(word in record["error"]["message"] for word in REFUSED[record["task"]]), record["error"]
    assert {record["attempts"] for record in [*refused, good]} == {good["result"]} == {1}


def test_a_result_that_has_no_end_or_cannot_be_read_fails_its_own_task_alone(farm: Farm) -> None:
    bad = ["Broken()", "[Endless()]", "circle", "[circle, math.nan]", "Listed(circle)"]
    records, _ = run(farm, "value", ["1", *[task for text in bad for task in (text, "2")]], "--retries", 1, status=1)
    assert [record["task"] for record in records if "error" in record] == bad
    assert "ProcessDied" not in {record["error"]["type"] for record in records if "error" in record}
    assert len({record["worker"] for record in records}) == 1


def test_a_result_of_too_many_parts_is_not_computed_again(farm: Farm) -> None:
    (record,), _ = run(farm, "value", ["['ab'] * 2_100_000"], "--retries", 1, status=1)
    assert (record["attempts"], record["error"]["type"]) == (1, "ValueError")
    assert "more than 2000000 strings" in record["error"]["message"]


def check_started_at(records: list[dict[str, Any]], began_at: float) -> None:
    assert all(began_at - 0.002 <= record["started_at"] <= time.time() + 0.002 for record in records)


def test_each_record_says_when_its_task_was_started_to_the_millisecond(farm: Farm) -> None:
    began_at = time.time()
    records, _ = run(farm, "once", list(range(3)), "--retries", 1)
    run(farm, "double", [1, 3], "--results", "more.jsonl", status=1)
    check_started_at(records + farm.records("more.jsonl"), began_at)
    lines = (farm.folder / "results.jsonl").read_text() + (farm.folder / "more.jsonl").read_text()
    assert len(re.findall(r'"started_at": \d+\.\d{3}, "seconds": ', lines)) == len(lines.splitlines())
    farm.run_master("--results", "command.jsonl", "--workers", 1, "--command", "exit {}", "0", "1", status=1)
    check_started_at(farm.records("command.jsonl"), began_at)


def test_a_clock_that_is_set_or_has_slept_counts_from_the_next_task(monkeypatch: pytest.MonkeyPatch) -> None:
    shift, now = 0.0, time.time

    def set_clock(_task: object) -> None:
        nonlocal shift
        shift = 8 * 3600.0
        time.sleep(0.002)

    monkeypatch.setattr(time, "time", lambda: now() + shift)
    memory = task_worker.Memory()
    memory.words[task_worker.TIME_LIMIT] = math.inf
    task_worker.run_tasks(set_clock, ["0 1", "1 1"], memory, None, task_worker.identify_streams())
    written = bytes(memory.bytes[task_worker.HEADER : int(memory.words[task_worker.LENGTH])]).decode()
    first, second = [json.loads("{" + line + "}")["started_at"] for line in written.splitlines()]
    assert 8 * 3600 <= second - first < 9 * 3600


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_stops_after_failures_counts_them_as_the_file_does(farm: Farm, limit: int, processes: int) -> None:
    records, master = run(farm, "double", [0] * 500, "--max-failures", limit, "--workers", processes, status=1)
    failed = len([record for record in records if "error" in record])
    said = [line for line in master.stderr if re.search(" retried,|--max-failures", line) and "to carry on" not in line]
    assert limit <= failed < 500
    assert set(re.findall(r"\b(\d+)(?: tasks?)? failed\b", " ".join(said))) == {str(failed)}, said


def test_of_a_long_traceback_the_innermost_thousand_frames_are_told(request: pytest.FixtureRequest) -> None:
    def outermost() -> None:
        inner(2000)

    def inner(n: int) -> None:
        if n:
            inner(n - 1)
        innermost()

    def innermost() -> None:
        raise ValueError

    request.addfinalizer(functools.partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(5000)
    with pytest.raises(ValueError) as raised:
        outermost()
    trace = json.loads("{" + task_worker.describe_error(raised.value) + "}")["error"]["traceback"]
    assert "in innermost" in trace and "in outermost" not in trace

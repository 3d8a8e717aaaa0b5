"""A task that has finished stays finished, and is recorded while the next one runs, whatever becomes of that one."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from lab import MEGABYTE, Farm, Program, check_once

QUICK = 300  # tasks before the last one, a few milliseconds of work
MODULE = """
import ctypes, os, signal, subprocess, sys, time
from functions import note, stay

libc = ctypes.PyDLL(None)

def last(task):
    '''All tasks are quick but the last one, which is a text: what happens then.'''
    if task == "stay":
        return stay(task)
    note(task)
    if isinstance(task, int):
        return task
    if task == "large":
        return "x" * (2 << 20)
    if task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)

def repeat(n):
    return str(n) * 300_000

def large(size):
    note(size)
    return "x" * size

def fork(n):
    '''Some tasks fork, and the copy comes back: in C, with an error, when the next tasks run, or with much.'''
    note(n)
    time.sleep(0.005)
    if n % 50 == 5:
        libc.fork()
    elif n % 50 == 15 and not os.fork():
        sys.exit(n)
    elif n % 50 == 25 and not os.fork():
        time.sleep(0.2)
    elif n % 50 == 35:
        os.fork()
    return [n] + [0] * 500_000 * (n % 50 == 35)
"""


def start(farm: Farm, tasks: list[Any], function: str, *options: object) -> Program:
    """A job of a worker with one process, whose retries would show what is run again."""
    farm.write_tasks(tasks)
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", "--retries", 0, *options)
    farm.worker(master, "--function", f"mod:{function}")
    return master


def check_run_once(farm: Farm, tasks: list[Any], *again: Any) -> None:
    """Each task was started once, or more often if it is one of `again`, and has one record."""
    assert sorted(farm.started()) == sorted(map(str, [*tasks, *again]))
    records = farm.in_order()  # what stood behind a slow one may come later
    assert [record["id"] for record in records] == [*range(len(tasks))]
    assert [(record["task"], record["attempts"]) for record in records] == [(task, 1 + again.count(task)) for task in tasks]


@pytest.mark.early
def test_what_has_finished_is_recorded_while_each_of_several_slow_tasks_runs(farm: Farm) -> None:
    tasks = [*range(50), "stay", *range(50, 100), "more", *range(100, 150)]
    master = start(farm, tasks, "last", "--timeout", 12)
    farm.wait_started(master, "stay")
    farm.wait_records(master, 50)
    farm.let_go()
    assert master.wait() == 1
    records = {record["task"]: record for record in farm.records()}
    assert [*map(str, records)] == [*dict.fromkeys(farm.started())] == farm.started()
    assert [task for task in tasks if "error" in records[task]] == ["more"]


def test_a_row_of_tasks_that_are_longer_than_those_before_them_is_shared(farm: Farm) -> None:
    farm.write("naps.py", "import os, time\ndef nap(seconds):\n    time.sleep(seconds)\n    return os.getpid()\n")
    tasks = farm.write_tasks([*[0.001] * 1000, *[0.3] * 20, *[0.001] * 1000])
    farm.run_job("--tasks", tasks, "--workers", 2, "--function", "naps:nap")
    pids = [record["result"] for record in farm.records() if record["task"] == 0.3]
    assert {pids.count(pid) > 4 for pid in pids} == {True} and len({*pids}) == 2, pids


@pytest.mark.parametrize(
    ("last", "kind", "options", "retries"),
    [
        ("kill", "ProcessDied", [], 2),
        pytest.param("overrun", "TimeoutError", ["--timeout", 8], 0, marks=pytest.mark.early),
    ],
)
@pytest.mark.parametrize("behind", [0, 50], ids=["at the end", "in the middle"])
def test_what_has_finished_is_not_run_again_when_the_next_task_dies(
    farm: Farm, last: str, kind: str, options: list[object], retries: int, behind: int
) -> None:
    tasks = [*range(QUICK), last, *range(QUICK, QUICK + behind)]
    assert start(farm, tasks, "last", *options, "--retries", retries).wait() == 1
    check_run_once(farm, tasks, *[last] * retries)
    errors = {record["task"]: record["error"]["type"] for record in farm.records() if "error" in record}
    assert errors == {last: kind}


LARGE = [*range(100), MEGABYTE, *range(100, 150), 8 * MEGABYTE, 3 * MEGABYTE, *range(150, 250), MEGABYTE + 1, 250]
MANY = [20_000 + n for n in range(200)]
LARGEST = [*[1] * 60, 7_900_000, 60_000_000, *[1] * 20]  # which do not fit one message


@pytest.mark.parametrize("sizes", [LARGE, MANY, LARGEST], ids=["each", "together", "largest"])
def test_outcomes_larger_than_the_shared_memory_stay_in_order_and_complete(farm: Farm, sizes: list[int]) -> None:
    assert start(farm, sizes, "large").wait() == 0
    check_run_once(farm, sizes)
    assert [record["result"] == "x" * size for record, size in zip(farm.in_order(), sizes)] == [True] * len(sizes)


@pytest.mark.parametrize("last", ["stay", "kill"])
def test_what_stands_behind_a_large_outcome_is_recorded_though_the_next_task_stays_or_dies(farm: Farm, last: str) -> None:
    tasks = [*range(50), "large", *range(50, 100), last]
    master = start(farm, tasks, "last")
    if last == "stay":
        farm.wait_started(master, "stay")
        farm.wait_records(master, 101)
        farm.let_go()
    assert master.wait() == (last == "kill")
    check_run_once(farm, tasks)
    assert [record["id"] for record in farm.records() if "error" in record] == [101] * (last == "kill")


def test_lines_that_are_no_tasks_get_records_that_no_large_outcome_tears(farm: Farm) -> None:
    """The reader records them, while others record outcomes, and whoever reads them is slow."""
    master = farm.master("--tasks", "-", "--results", "-", stdin=subprocess.PIPE)
    farm.worker(master, "--processes", 2, "--function", "mod:repeat")
    for n in range(100):
        master.put(f"{n % 10}\n{'bad' * 30_000}\n")
        master.pause(0.01)
    master.end_input()
    assert master.wait() == 1
    records = [json.loads(line) for line in master.stdout]
    check_once(records, 200)
    assert [record["id"] % 2 for record in records] == ["error" in record for record in records]


def test_a_forked_copy_that_comes_back_adds_nothing(farm: Farm) -> None:
    tasks = [*range(100)]
    assert start(farm, tasks, "fork").wait() == 0
    check_run_once(farm, tasks)
    assert [result[0] for result in farm.values()] == tasks

"""Clients that share no code with this repository, and masters and workers of different Python versions.

A plain client is a few lines of BaseManager: one put for each get, in order, whatever goes wrong with one of them.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
from lab import PLAIN_CLIENT, Farm, Program, find_pythons

TUTORIAL = """
for i in range(10):
    try:
        n = tasks.get(timeout=1)
        print("run task %d * %d..." % (n, n), flush=True)
        results.put("%d * %d = %d" % (n, n, n * n))
    except queue.Empty:
        print("task queue is empty.", flush=True)
print("worker exit.")
"""
ASK_ONCE = """
for options in [{"timeout": 0.05}, {"block": False}]:
    try:
        print(tasks.get(**options))
    except queue.Empty as error:
        print(type(error), tasks.qsize())
print("nothing yet", flush=True)
try:
    print(tasks.get())
except queue.Empty:
    print("the job is over")
"""
TAKE_AND_WAIT = """
print("took", tasks.get(timeout=30), flush=True)
sys.stdin.read()
"""
MEET = """
import time
from functions import note

def meet(n):
    note(n)
    while len(set(open("started.log"))) < {count}:
        time.sleep(0.01)
    return n
"""
BYTES = "b'x'"  # plain data, but not JSON
PYTHONS = find_pythons()


def start_client(farm: Farm, master: Program, code: str, python: str = sys.executable, **options: object) -> Program:
    client = farm.write("client.py", PLAIN_CLIENT + code)
    return farm.run(client, master.port(), farm.key, python=python, **options)


def start_master(farm: Farm, *tasks: object) -> Program:
    return farm.master("--tasks", farm.write_tasks(tasks), "--results", "results.jsonl")


@pytest.mark.parametrize("version", PYTHONS)
def test_a_client_of_a_dozen_lines_drains_the_master(farm: Farm, version: str) -> None:
    master = farm.master(*range(10))
    client = start_client(farm, master, TUTORIAL, PYTHONS[version])
    assert (client.wait(), master.wait()) == (0, 0), client.stderr
    assert client.stdout == [f"run task {n} * {n}..." for n in range(10)] + ["worker exit."]
    assert master.stdout[11:] == [f"Result: {n} * {n} = {n * n}" for n in range(10)]


def test_queue_empty_reaches_a_client_when_there_is_no_task_in_time_and_when_the_job_is_over(farm: Farm) -> None:
    master = start_master(farm, 2)
    busy = start_client(farm, master, TAKE_AND_WAIT + "results.put('late')\n", stdin=subprocess.PIPE)
    busy.wait_line("^took 2$", "stdout")
    waiting = start_client(farm, master, ASK_ONCE)
    waiting.wait_line("^nothing yet$", "stdout")
    busy.end_input()
    assert (waiting.wait(), busy.wait(), master.wait()) == (0, 0, 0), waiting.stderr
    assert waiting.stdout == ["<class '_queue.Empty'> 0"] * 2 + ["nothing yet", "the job is over"]
    assert farm.values() == ["late"]


def test_the_end_of_a_client_gives_its_task_back(farm: Farm) -> None:
    master = start_master(farm, 5)
    client = start_client(farm, master, TAKE_AND_WAIT, stdin=subprocess.PIPE)
    client.wait_line("^took 5$", "stdout")
    client.kill()
    master.wait_line(r"redelivered since \S+ was lost: task 0 ")
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)
    (record,) = farm.records()
    assert (record["result"], record["attempts"]) == ("5 * 5 = 25", 2)


def test_a_result_without_a_task_is_a_value_error_for_the_client(farm: Farm) -> None:
    master = farm.master(7)
    code = """
try:
    results.put("out of the blue")
except ValueError as error:
    print("refused:", error)
n = tasks.get()
results.put({"n": n, "list": [1.5, math.nan, True], "x": -math.inf, "large": math.factorial(300)})
"""
    client = start_client(farm, master, code)
    assert (client.wait(), master.wait()) == (0, 0)
    assert client.stdout[0].startswith("refused: put without get")
    assert master.stdout[-1] == f'Result: {{"n": 7, "list": [1.5, null, true], "x": null, "large": {math.factorial(300)}}}'


def test_a_client_may_take_all_there_is_and_its_results_settle_its_tasks_in_the_order_of_taking(farm: Farm) -> None:
    master = start_master(farm, "a", "b", "c")
    code = """
taken = []
while not tasks.empty():
    taken.append(tasks.get_nowait())
    assert tasks.empty() == (tasks.qsize() == 0)
try:
    tasks.get_nowait()
except queue.Empty:
    print("empty")
for task in taken:
    results.put(task.upper())
"""
    client = start_client(farm, master, code)
    assert (client.wait(), master.wait()) == (0, 0), client.stderr
    assert client.stdout == ["empty"]
    assert farm.values() == ["A", "B", "C"]


def test_a_task_that_cannot_be_sent_does_not_shift_the_results_of_those_taken_before_or_after_it(farm: Farm) -> None:
    tasks = [task for depth in (100, 450, 600, 900) for task in (f'"{depth}"', "[" * depth + "]" * depth) * 2]
    farm.write("tasks", "\n".join([*tasks, '"last"']))
    master = farm.master("--tasks", "tasks", "--results", "results.jsonl")
    code = """
taken = []
for _ in range(20):
    try:
        taken.append(tasks.get(timeout=1))
    except queue.Empty:
        break
    except Exception as error:
        print("no", type(error).__name__)
for task in taken:
    results.put(task + "!" if isinstance(task, str) else "list")
"""
    client = start_client(farm, master, code)
    assert client.wait() == 0, client.stderr
    farm.write("rest.py", "def f(task):\n    return 'list'\n")  # what the client could not get is for workers
    farm.worker(master, "--wait", 0.5, "--function", "rest:f").wait()
    assert master.wait() in (0, 1), master.stderr
    text = (farm.folder / "results.jsonl").read_text()
    found = re.findall(r'"task": "(\w+)", "result": "(.*?)"', text)
    assert sorted(found) == sorted((task, f"{task}!") for task in ["100", "450", "600", "900"] * 2 + ["last"])
    assert len(re.findall(r'\]+, ("result": "list"|"error": )', text)) == 8


def test_a_result_that_is_refused_is_an_error_of_its_task_and_is_said(farm: Farm) -> None:
    refused = ["{1, 2}", "object()", BYTES, "1j", "{(1, 2): 3}", "decimal.Decimal(1)", "os.getcwd"]
    master = start_master(farm, *["good", "refused"] * len(refused), "good")
    code = """
import decimal, os
for value in ["first", %s]:
    tasks.get()
    try:
        results.put(value)
    except Exception as error:
        print("refused", repr(error))
"""
    for number, result in enumerate(refused):
        start_client(farm, master, code % result).wait()
        farm.wait_records(master, 2 * number + 2)
    assert start_client(farm, master, "tasks.get()\nresults.put('last')\n").wait() == 0
    assert master.wait() == 1, master.stderr
    assert farm.values() == ["first", None] * len(refused) + ["last"]
    assert all(record["error"]["message"] for record in farm.records() if record["task"] == "refused")
    assert len(master.said("^task_master: closed the connection of .*not plain data")) == len(refused) - 1
    assert master.said(f"task {2 * refused.index(BYTES) + 1} failed: TypeError: result is a bytes")


@pytest.mark.skipif(len(PYTHONS) < 2, reason=f"only one Python from 3.9 on was found: {', '.join(PYTHONS)}")
@pytest.mark.parametrize("version", PYTHONS)
def test_a_master_and_workers_of_different_python_versions_understand_each_other(farm: Farm, version: str) -> None:
    """Each runs one task, which is over when all of them run."""
    farm.write("meet.py", MEET.format(count=len(PYTHONS)))
    options = ["--tasks", "-", "--results", "results.jsonl", "--workers", 1, "--function", "meet:meet"]
    master = farm.master(*options, python=PYTHONS[version], stdin=subprocess.PIPE)
    others = [python for other, python in PYTHONS.items() if other != version]
    workers = [farm.worker(master, "--function", "meet:meet", python=python) for python in others]
    master.wait_line(r"worker \S+/\d+ connected", count=len(PYTHONS))
    master.give(range(len(PYTHONS)))
    assert [worker.wait() for worker in workers] == [0] * len(others)
    assert master.wait() == 0
    pids = {int(record["worker"].split("/")[1]) for record in farm.records()}
    assert pids > {worker.pid for worker in workers}
    assert len(pids) == len(PYTHONS)

"""Clients that share no code with this repository, and masters and workers of different Python versions."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from lab import PLAIN_CLIENT, Farm, Program, find_pythons

CLIENT = PLAIN_CLIENT + 'print("connected", flush=True)\n'

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

UNTIL_EMPTY = """
while True:
    try:
        n = tasks.get(timeout=30)
    except queue.Empty:
        break
    results.put(n * n)
print("worker exit.")
"""

ASK_ONCE = """
try:
    tasks.get(timeout=0.01)
except queue.Empty:
    print("nothing yet", flush=True)
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
PYTHONS = find_pythons()


def start_client(
    farm: Farm, master: Program, code: str, python: str = sys.executable, key: str = "", **options: object
) -> Program:
    return farm.run(farm.write("client.py", CLIENT + code), master.port(), key or farm.key, python=python, **options)


# ---- the tutorial's client -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", PYTHONS)
def test_a_client_of_a_dozen_lines_drains_the_master(farm: Farm, version: str) -> None:
    master = farm.master(*range(10))
    client = start_client(farm, master, TUTORIAL, PYTHONS[version])
    assert (client.wait(), master.wait()) == (0, 0), client.stderr
    assert client.stdout[1:] == [f"run task {n} * {n}..." for n in range(10)] + ["worker exit."]
    assert master.stdout[11:] == [f"Result: {n} * {n} = {n * n}" for n in range(10)]


def test_queue_empty_reaches_a_client_when_there_is_no_task_in_time(farm: Farm) -> None:
    code = """
for options in [{"timeout": 0.05}, {"block": False}]:
    try:
        print(tasks.get(**options))
    except queue.Empty as error:
        print(type(error), tasks.qsize())
print("asked", flush=True)
n = tasks.get()
results.put(n + 1)
"""
    master = farm.master("--tasks", "-", "--results", "-", stdin=subprocess.PIPE)
    client = start_client(farm, master, code)
    client.wait_line("^asked$", "stdout")
    assert client.stdout[1:3] == ["<class '_queue.Empty'> 0"] * 2
    master.put("41\n")
    master.end_input()
    assert (client.wait(), master.wait()) == (0, 0)
    assert json.loads(master.stdout[0])["result"] == 42


def test_queue_empty_reaches_a_client_when_the_job_is_over(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", *range(3))
    client = start_client(farm, master, UNTIL_EMPTY)
    assert (client.wait(), master.wait()) == (0, 0), client.stderr
    assert client.stdout[-1] == "worker exit."
    assert [record["result"] for record in farm.records()] == [0, 1, 4]


def test_a_client_that_waits_for_a_task_hears_that_the_job_is_over(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", 2)
    busy = start_client(farm, master, TAKE_AND_WAIT + "results.put('late')\n", stdin=subprocess.PIPE)
    busy.wait_line("^took 2$", "stdout")
    waiting = start_client(farm, master, ASK_ONCE + UNTIL_EMPTY)
    waiting.wait_line("^nothing yet$", "stdout")
    busy.end_input()
    assert (waiting.wait(), busy.wait(), master.wait()) == (0, 0, 0), waiting.stderr
    assert [record["result"] for record in farm.records()] == ["late"]


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_the_end_of_a_client_gives_its_task_back(farm: Farm, how: str) -> None:
    master = farm.master("--results", "results.jsonl", 5)
    client = start_client(farm, master, TAKE_AND_WAIT, stdin=subprocess.PIPE)
    client.wait_line("^took 5$", "stdout")
    if how == "killed":
        client.kill()
    client.end_input()
    master.wait_line(r"redelivered since \S+ was lost: task 0 ")
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)
    (record,) = farm.records()
    assert (record["result"], record["attempts"]) == ("5 * 5 = 25", 2)


def test_results_settle_the_tasks_of_a_client_in_the_order_of_taking(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", '"a"', '"b"', '"c"')
    code = "for task in [tasks.get() for _ in range(3)]:\n    results.put(task.upper())\n"
    assert (start_client(farm, master, code).wait(), master.wait()) == (0, 0)
    assert [(record["task"], record["result"]) for record in farm.records()] == [("a", "A"), ("b", "B"), ("c", "C")]


def test_a_result_without_a_task_is_a_value_error_for_the_client(farm: Farm) -> None:
    master = farm.master(7)
    code = """
try:
    results.put("out of the blue")
except ValueError as error:
    print("refused:", error)
n = tasks.get()
results.put({"n": n, "list": [1.5, None, True]})
"""
    client = start_client(farm, master, code)
    assert (client.wait(), master.wait()) == (0, 0)
    assert client.stdout[1].startswith("refused: put without get")
    assert master.stdout[-1] == 'Result: {"n": 7, "list": [1.5, null, true]}'


def test_a_client_with_another_key_is_refused(farm: Farm) -> None:
    master = farm.master(1)
    client = start_client(farm, master, "", key="another key than the master has")
    assert client.wait() == 1
    assert "AuthenticationError" in client.stderr[-1]
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)


# ---- different Pythons ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(PYTHONS) < 2, reason=f"only one Python from 3.9 on was found: {', '.join(PYTHONS)}")
@pytest.mark.parametrize("version", PYTHONS)
def test_a_master_with_a_local_worker_and_workers_of_other_python_versions_understand_each_other(
    farm: Farm, version: str
) -> None:
    """Each runs one task, which is over when all of them run."""
    farm.write("meet.py", MEET.format(count=len(PYTHONS)))
    options = ["--tasks", "-", "--results", "results.jsonl", "--workers", 1, "--function", "meet:meet"]
    master = farm.master(*options, python=PYTHONS[version], stdin=subprocess.PIPE)
    others = [python for other, python in PYTHONS.items() if other != version]
    workers = [farm.worker(master, "--function", "meet:meet", python=python) for python in others]
    master.wait_line(r"worker \S+/\d+ connected", count=len(PYTHONS))
    master.put("".join(f"{n}\n" for n in range(len(PYTHONS))))
    master.end_input()
    assert [worker.wait() for worker in workers] == [0] * len(others)
    assert master.wait() == 0
    pids = {int(record["worker"].split("/")[1]) for record in farm.records()}
    assert pids > {worker.pid for worker in workers}
    assert len(pids) == len(PYTHONS)

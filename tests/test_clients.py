"""Clients that share no code with this repository, and masters and workers of different Python versions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Farm, Program

# What a reader of the tutorial writes, and runs as `client.py PORT KEY`.
CLIENT = """
import queue, sys
from multiprocessing.managers import BaseManager

class QueueManager(BaseManager):
    pass

QueueManager.register("get_task_queue")
QueueManager.register("get_result_queue")
manager = QueueManager(address=("127.0.0.1", int(sys.argv[1])), authkey=sys.argv[2].encode())
manager.connect()
tasks, results = manager.get_task_queue(), manager.get_result_queue()
print("connected", flush=True)
"""

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


def find_pythons() -> dict[str, str]:
    """Version and executable of each Python from 3.9 on that is found on PATH or under PYENV_ROOT; the running one first."""
    names = [f"python3.{minor}" for minor in range(9, 20)]
    found = [shutil.which(name) for name in names]
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    candidates = [sys.executable, *filter(None, found), *sorted(map(str, Path(root).glob("versions/3.*/bin/python3")))]
    pythons: dict[str, str] = {}
    for candidate in candidates:
        code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        version, _, executable = answer.stdout.strip().partition(" ")
        if answer.returncode == 0 and tuple(map(int, version.split("."))) >= (3, 9):
            pythons.setdefault(version, executable)
    return pythons


PYTHONS = find_pythons()


def start_client(farm: Farm, master: Program, code: str, python: str = sys.executable, **options: object) -> Program:
    (farm.folder / "client.py").write_text(CLIENT + code)
    return farm.run(farm.folder / "client.py", master.port(), farm.key, python=python, **options)


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
    assert master.process.stdin
    with master.process.stdin as pipe:
        client = start_client(farm, master, code)
        client.wait_line("^asked$", "stdout")
        assert client.stdout[1:3] == ["<class '_queue.Empty'> 0"] * 2
        pipe.write(b"41\n")
    assert (client.wait(), master.wait()) == (0, 0)
    assert json.loads(master.stdout[0])["result"] == 42


def test_queue_empty_reaches_a_client_when_the_job_is_over(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", *range(3))
    client = start_client(farm, master, UNTIL_EMPTY)
    assert client.wait() == 0, client.stderr
    assert client.stdout[-1] == "worker exit."
    assert master.wait() == 0
    assert [record["result"] for record in farm.records()] == [0, 1, 4]


def test_a_client_that_waits_for_a_task_hears_that_the_job_is_over(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", 2)
    busy = start_client(farm, master, TAKE_AND_WAIT + "results.put('late')\n", stdin=subprocess.PIPE)
    busy.wait_line("^took 2$", "stdout")
    waiting = start_client(farm, master, ASK_ONCE + UNTIL_EMPTY)
    waiting.wait_line("^nothing yet$", "stdout")
    assert busy.process.stdin
    busy.process.stdin.close()
    assert (waiting.wait(), busy.wait(), master.wait()) == (0, 0, 0), waiting.stderr
    assert [record["result"] for record in farm.records()] == ["late"]


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_the_end_of_a_client_gives_its_task_back(farm: Farm, how: str) -> None:
    master = farm.master("--results", "results.jsonl", 5)
    client = start_client(farm, master, TAKE_AND_WAIT, stdin=subprocess.PIPE)
    client.wait_line("^took 5$", "stdout")
    assert client.process.stdin
    if how == "killed":
        client.kill()
    client.process.stdin.close()
    master.wait_line(r"redelivered since \S+ was lost: task 0 ")
    worker = farm.worker(master)
    assert (worker.wait(), master.wait()) == (0, 0)
    (record,) = farm.records()
    assert (record["result"], record["attempts"]) == ("5 * 5 = 25", 2)


def test_results_settle_the_tasks_of_a_client_in_the_order_of_taking(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", '"a"', '"b"', '"c"')
    code = """
taken = [tasks.get() for _ in range(3)]
for task in taken:
    results.put(task.upper())
"""
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


def test_a_result_that_is_not_json_fails_the_clients_task_alone(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", 0, 1, 2)
    code = """
for result in [float("nan"), b"bytes", "good"]:
    tasks.get()
    results.put(result)
"""
    assert (start_client(farm, master, code).wait(), master.wait()) == (0, 1)
    assert [(record.get("error") or {}).get("type") for record in farm.records()] == ["ValueError", "TypeError", None]


def test_a_client_with_another_key_is_refused(farm: Farm) -> None:
    master = farm.master(1)
    (farm.folder / "client.py").write_text(CLIENT)
    client = farm.run(farm.folder / "client.py", master.port(), "another key than the master has")
    assert client.wait() == 1
    assert re.search("AuthenticationError", client.stderr[-1])
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)


# ---- different Pythons ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(PYTHONS) < 2, reason=f"only one Python from 3.9 on was found: {', '.join(PYTHONS)}")
@pytest.mark.parametrize("version", PYTHONS)
def test_a_master_with_a_local_worker_and_workers_of_other_python_versions_understand_each_other(
    farm: Farm, version: str
) -> None:
    options = ["--tasks", "-", "--results", "-", "--batch", 1, "--workers", 1, "--function", "functions:nap"]
    master = farm.master(*options, python=PYTHONS[version], stdin=subprocess.PIPE, bufsize=0)
    assert master.process.stdin
    others = [python for other, python in PYTHONS.items() if other != version]
    with master.process.stdin as pipe:
        workers = [farm.worker(master, "--function", "functions:nap", python=python) for python in others]
        master.wait_line(r"worker \S+/\d+ connected", count=len(PYTHONS))
        pipe.write(b"0.05\n" * (8 * len(PYTHONS)))  # so short a nap that nobody takes two before everybody took one
    assert [worker.wait() for worker in workers] == [0] * len(others)
    assert master.wait() == 0
    records = list(map(json.loads, master.stdout))
    assert len(records) == 8 * len(PYTHONS)
    pids = {int(record["worker"].split("/")[1]) for record in records}
    assert pids > {worker.pid for worker in workers}
    assert len(pids) == len(PYTHONS)

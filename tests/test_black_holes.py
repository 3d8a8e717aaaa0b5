"""A host on which every task fails at once: it gets few of them, and a retry goes elsewhere."""

from __future__ import annotations

import json
import subprocess

import pytest
from lab import Farm, Program, make_outcome

MODULE = """
import os, time

def work(n):
    if os.environ.get("LACKS") or n < 0:
        raise FileNotFoundError(f"/mnt/data/{n}")
    time.sleep(0.02)
    return n
"""


def start_farm(farm: Farm, tasks: list[int], *options: object, **hosts: bool) -> tuple[Program, list[Program]]:
    """A master, and a worker for each host, which may lack something; when all are there, so are the tasks."""
    master = farm.master("--tasks", "-", "--results", "results.jsonl", *options, stdin=subprocess.PIPE)
    where = ("--port", master.port(), "--processes", 2, "--function", "mod:work")
    workers = []
    for name, lacks in hosts.items():
        workers.append(farm.run("task_worker.py", *where, env=farm.env(TASK_HOST=name, LACKS="a mount" if lacks else None)))
        master.wait_line(f"worker {name}/.* connected")
    master.give(tasks)
    return master, workers


def count_failed(farm: Farm, count: int) -> int:
    """How many of so many records tell of an error."""
    farm.check_once(count)
    return len([record for record in farm.records() if "error" in record])


@pytest.mark.parametrize("first", ["bad", "good"])
@pytest.mark.parametrize("retries", [0, 1])
def test_a_host_that_fails_at_once_does_not_eat_the_queue(farm: Farm, retries: int, first: str) -> None:
    hosts = dict(sorted({"bad": True, "good1": False, "good2": False}.items(), reverse=first == "good"))
    master, workers = start_farm(farm, [*range(800)], "--retries", retries, **hosts)
    assert master.wait() == (1 if retries == 0 else 0)
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert count_failed(farm, 800) <= (30 if retries == 0 else 0)
    (said,) = master.said("fails all its tasks")
    assert "bad/" in said and "FileNotFoundError: /mnt/data/" in said


def test_workers_that_have_one_name_are_told_apart(farm: Farm) -> None:
    """As in containers, where each may be process 1 of a host of that name."""
    master = farm.master("--tasks", farm.write_tasks(range(200)), "--results", "results.jsonl")
    bad, good = farm.peer(master), farm.peer(master)
    for peer in (bad, good):
        peer.join(json.dumps({"function": None, "command": None, "id": str(id(peer))}))
    error = make_outcome('{"type": "OSError", "message": "no mount", "traceback": ""}', "error")
    for peer, outcomes in ((bad, [error] * 10), (good, [make_outcome("1")])):
        for outcome in outcomes:
            peer.report(f"{peer.lease_ids()[0]} {outcome}")
    assert [len(peer.lease(5)) for peer in (bad, good)] == [1, 5]


def test_tasks_that_fail_everywhere_cast_no_doubt_on_anybody(farm: Farm) -> None:
    master, workers = start_farm(farm, [-1] * 500, one=False, two=False)
    assert master.wait() == 1
    assert [worker.wait() for worker in workers] == [0, 0]
    assert count_failed(farm, 500) == 500

"""A host on which every task fails at once: it gets few of them, and a retry goes elsewhere."""

from __future__ import annotations

import json
import subprocess

import pytest
from lab import Farm, make_outcome

MODULE = """
import os, time

def work(n):
    if os.environ.get("LACKS"):
        raise FileNotFoundError(f"/mnt/data/{n}")
    time.sleep(0.02)
    return n
"""


@pytest.mark.parametrize("first", ["bad", "good"])
@pytest.mark.parametrize("retries", [0, 1])
def test_a_host_that_fails_at_once_does_not_eat_the_queue(farm: Farm, retries: int, first: str) -> None:
    what = ("--tasks", "-", "--results", "results.jsonl", "--retries", retries)
    master = farm.master(*what, stdin=subprocess.PIPE)
    where = ("--port", master.port(), "--processes", 2, "--function", "mod:work")
    workers = []
    for name in sorted(["bad", "good1", "good2"], reverse=first == "good"):
        env = farm.env(TASK_HOST=name, LACKS="a mount" if name == "bad" else None)
        workers.append(farm.run("task_worker.py", *where, env=env))
        master.wait_line(f"worker {name}/.* connected")
    master.give(range(800))
    assert master.wait() == (1 if retries == 0 else 0)
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    farm.check_once(800)
    assert len([record for record in farm.records() if "error" in record]) <= (30 if retries == 0 else 0)
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

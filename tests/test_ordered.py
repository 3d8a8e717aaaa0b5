"""--ordered: the file is in the order of the tasks when the job ends or drains; and --max-failures, which ends a job early."""

from __future__ import annotations

import json
import signal

import pytest
from lab import Farm, Program, check_said, make_outcome, ok, wait_until

MODULE = """
import os, time
from functions import mendable, stay, work

def fragile(n):
    '''The first attempt at every fourth task fails, and each of these takes longer than its neighbours.'''
    if n % 4 == 0 and not os.path.exists(f"attempt-{n}"):
        time.sleep(0.05)
        open(f"attempt-{n}", "w").close()
        raise ValueError("not at once")
    return 2 * n

def late(n):
    '''Task 0 waits until the test lets it go; the others return at once.'''
    return 2 * (n or stay(n))
"""
OPTIONS = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--ordered"]


def start(farm: Farm, count: int, function: str, *options: object) -> Program:
    farm.write_tasks(range(count))
    return farm.master(*OPTIONS, "--workers", 3, "--function", f"mod:{function}", *options)


def ids(farm: Farm) -> list[int]:
    return [record["id"] for record in farm.records()]


def check_in_order(farm: Farm, count: int) -> None:
    assert ids(farm) == list(range(count))
    farm.check_doubled(count)


@pytest.mark.parametrize("foreign", ["", "nonsense\n"])
def test_records_are_put_in_order_at_the_end_unless_another_program_has_written_there(farm: Farm, foreign: str) -> None:
    master = start(farm, 40, "late")
    farm.wait_records(master, 39)
    assert 0 not in ids(farm), "they are written as they come"
    with farm.results.open("a") as file:
        file.write(foreign)
    farm.let_go()
    if foreign:
        check_said(master, 0, r"cannot rewrite results\.jsonl in order: another program has written there")
    else:
        assert master.wait() == 0
        check_in_order(farm, 40)


def test_a_retried_task_gets_its_place_and_is_no_failure(farm: Farm) -> None:
    assert start(farm, 40, "fragile", "--retries", 1, "--max-failures", 1).wait() == 0
    check_in_order(farm, 40)
    assert [record["attempts"] for record in farm.records()] == [2 if n % 4 == 0 else 1 for n in range(40)]


def test_a_failed_task_gets_its_place_and_keeps_it_when_it_is_repeated(farm: Farm) -> None:
    """One failure more would end the job."""
    assert start(farm, 30, "mendable", "--max-failures", 4).wait() == 1
    assert ids(farm) == list(range(30))
    assert ["error" in record for record in farm.records()] == [n % 10 == 7 for n in range(30)]
    farm.mend()
    assert start(farm, 30, "mendable", "--resume").wait() == 0
    check_in_order(farm, 30)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_was_stopped_is_in_order_after_a_drain_and_after_it_was_resumed(farm: Farm, end: int) -> None:
    farm.write_tasks(range(30))
    master = farm.master(*OPTIONS)
    peer = farm.peer(master).join()
    assert [peer.lease_ids() for _ in range(6)] == [[n] for n in range(6)]
    for n in (4, 1, 5):
        peer.report(ok(n, 2 * n))
    master.signal(end)
    if end == signal.SIGTERM:
        master.wait_line("draining")
        peer.report(ok(0, 0))
    peer.close()
    assert master.wait() == (143 if end == signal.SIGTERM else -end)
    assert ids(farm) == ([0, 1, 4, 5] if end == signal.SIGTERM else [4, 1, 5])
    assert start(farm, 30, "work", "--resume").wait() == 0
    check_in_order(farm, 30)


@pytest.mark.parametrize("count", [12, 4], ids=["that goes on", "that is finished"])
def test_resuming_puts_a_job_in_order_that_was_not_and_alters_no_record(farm: Farm, count: int) -> None:
    lines = [json.dumps({"id": n, "task": n, "result": 2 * n, "worker": "w/1", "attempts": 1}) for n in (3, 2, 1, 0)]
    farm.write("results.jsonl", "".join(f"{line}\n" for line in lines) + '{"id": 3, "ta')
    assert start(farm, count, "work", "--resume").wait() == 0
    check_in_order(farm, count)
    assert farm.results.read_text().splitlines()[:4] == lines[::-1]


def check_stopped(master: Program, count: int) -> None:
    """It has ended since so many tasks failed, and says so once."""
    assert master.wait() == 1
    assert master.stderr[-1] == f"task_master: stopped, as --max-failures {count} asks"
    assert len(master.said("task_master: stopped, ")) == 1


def test_a_file_that_is_not_in_order_yet_goes_when_the_master_leaves_at_once(farm: Farm) -> None:
    farm.write_tasks(range(3))
    master = farm.altered_master("import time\nos.replace = lambda *names: time.sleep(60)", *OPTIONS, "--workers", 1)
    wait_until(lambda: len([*farm.folder.glob("results.jsonl.*")]) == 1)
    master.signal(signal.SIGINT)
    master.signal(signal.SIGTERM)
    assert master.wait() == 143
    assert [*farm.folder.glob("results.jsonl.*")] == []
    assert ids(farm) == [0, 1, 2]


def test_the_job_ends_at_the_last_failure_that_is_allowed_and_says_how_to_resume(farm: Farm) -> None:
    farm.write_tasks(range(50))
    master = farm.master(*OPTIONS, "--max-failures", 3, "--redeliveries", 0)  # so tasks are leased singly
    worker = farm.worker(master, "--function", "functions:fail")
    check_stopped(master, 3)
    assert worker.wait() == 0
    assert ids(farm) == [0, 1, 2]
    assert master.said("stopped; to carry on: .* --resume ")


def test_what_runs_when_the_last_failure_comes_is_finished(farm: Farm) -> None:
    master = farm.master(*OPTIONS[2:], "--max-failures", 1, 0, 1, 2)
    peers = [farm.peer(master).join() for _ in range(2)]
    assert [peer.lease_ids() for peer in peers] == [[0], [1]]
    peers[1].report("1 " + make_outcome('{"type": "E", "message": "m", "traceback": ""}', "error"))
    assert peers[1].call("get_task_queue", "lease", 1, 20.0) is None
    peers[0].report(ok(0, 0))
    check_stopped(master, 1)
    assert [("error" in record, record["id"]) for record in farm.records()] == [(False, 0), (True, 1)]

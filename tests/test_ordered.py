"""--ordered: records and lines in the order of the tasks, in bounded memory; and --max-failures, which ends a job early."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from conftest import Farm, Program

import task_master
from task_master import DONE, Ledger, Sequencer, Task

UNEVEN = """
import os, time

def uneven(n):
    time.sleep([0.06, 0, 0.02, 0, 0][n % 5])
    return n

def fragile(n):
    '''The first attempt at every fourth task fails, and each of these takes longer than its neighbours.'''
    if n % 4 == 0 and not os.path.exists(f"attempt-{n}"):
        time.sleep(0.05)
        open(f"attempt-{n}", "w").close()
        raise ValueError("not at once")
    return n

def late(n):
    '''Task 0 waits for the file that a test makes; the others return at once.'''
    if n == 0:
        print("holds", os.getppid(), flush=True)
        while not os.path.exists("go"):
            time.sleep(0.01)
    return n

def mixed(n):
    '''Every third task fails unless there is the file that mends it.'''
    time.sleep(0.02 * (n % 2))
    if n % 3 == 1 and not os.path.exists("mended"):
        raise ValueError("later")
    return n
"""


@pytest.fixture(autouse=True)
def uneven(farm: Farm) -> None:
    (farm.folder / "uneven.py").write_text(UNEVEN)


def run_ordered(farm: Farm, tasks: list[Any], function: str, *options: object) -> Program:
    farm.write_tasks(tasks)
    argv = ["--tasks", "tasks.jsonl", "--ordered", "--workers", 3, "--function", f"uneven:{function}", *options]
    master = farm.master(*argv)
    master.wait()
    return master


def ids(farm: Farm) -> list[int]:
    return [record["id"] for record in farm.records()]


def test_records_of_uneven_tasks_come_in_the_order_of_the_tasks(farm: Farm) -> None:
    run_ordered(farm, list(range(40)), "uneven", "--results", "results.jsonl")
    assert ids(farm) == list(range(40))
    assert [record["result"] for record in farm.records()] == list(range(40))


def test_result_lines_of_uneven_tasks_come_in_the_order_of_the_tasks(farm: Farm) -> None:
    master = run_ordered(farm, list(range(40)), "uneven")
    assert [line for line in master.stdout if line.startswith("Result")] == [f"Result: {n}" for n in range(40)]


def test_records_on_standard_output_come_in_order_too(farm: Farm) -> None:
    master = run_ordered(farm, list(range(20)), "uneven", "--results", "-")
    assert [json.loads(line)["id"] for line in master.stdout] == list(range(20))


def test_a_retried_task_keeps_its_place(farm: Farm) -> None:
    master = run_ordered(farm, list(range(40)), "fragile", "--results", "results.jsonl", "--retries", 1)
    assert ids(farm) == list(range(40))
    assert [record["attempts"] for record in farm.records()] == [2 if n % 4 == 0 else 1 for n in range(40)]
    assert master.wait() == 0


def test_a_failed_task_keeps_its_place(farm: Farm) -> None:
    master = run_ordered(farm, list(range(30)), "mixed", "--results", "results.jsonl")
    assert ids(farm) == list(range(30))
    assert ["error" in record for record in farm.records()] == [n % 3 == 1 for n in range(30)]
    assert master.wait() == 1


def test_a_task_whose_worker_was_killed_keeps_its_place(farm: Farm) -> None:
    farm.write_tasks(list(range(50)))
    master = farm.master("--tasks", "tasks.jsonl", "--ordered", "--results", "results.jsonl", "--batch", 1)
    victim = farm.worker(master, "--function", "uneven:late")
    victim.wait_line("holds", "stdout")
    other = farm.worker(master, "--function", "uneven:late")
    master.wait_line("worker .* connected", count=2)
    victim.kill()
    master.wait_line("redelivered since")
    other.wait_line("holds", "stdout")
    assert ids(farm) == []  # those behind it wait
    (farm.folder / "go").touch()
    assert (master.wait(), other.wait()) == (0, 0)
    assert ids(farm) == list(range(50))
    assert farm.records()[0]["attempts"] == 2


def test_resuming_ends_with_every_record_in_its_place(farm: Farm) -> None:
    assert run_ordered(farm, list(range(30)), "mixed", "--results", "results.jsonl").wait() == 1
    (farm.folder / "mended").touch()
    assert run_ordered(farm, list(range(30)), "mixed", "--results", "results.jsonl", "--resume").wait() == 0
    assert ids(farm) == list(range(30))
    assert [record["result"] for record in farm.records()] == list(range(30))


def test_resuming_a_job_that_was_not_ordered_orders_it(farm: Farm) -> None:
    path = farm.folder / "results.jsonl"
    lines = [json.dumps({"id": n, "task": n, "result": n, "seconds": 0, "worker": "w/1", "attempts": 1}) for n in (7, 2, 9, 0)]
    path.write_text("".join(line + "\n" for line in lines) + '{"id": 3, "ta')
    assert run_ordered(farm, list(range(12)), "uneven", "--results", "results.jsonl", "--resume").wait() == 0
    assert ids(farm) == list(range(12))
    assert lines == [path.read_text().splitlines()[n] for n in (7, 2, 9, 0)]


# ---- bounded memory, in one thread ---------------------------------------------------------------------------------


class Walk:
    """A ledger and a sequencer without a server; slots that lease, report, fail, release and vanish at random."""

    def __init__(self, seed: int, tasks: int, kept: list[int], **limits: Any) -> None:
        self.dice = random.Random(seed)
        self.ledger = Ledger(**limits)
        self.written: list[int] = []
        self.settled = 0
        self.most_waiting = 0
        self.sequencer = Sequencer(self.ledger, self.write, kept)
        self.ids = [task_id for task_id in range(tasks) if task_id >= len(kept) or not kept[task_id]]
        self.ledger.submit([(task_id, f'"{task_id}"') for task_id in self.ids])
        self.ledger.end()
        self.held: dict[str, list[int]] = {f"slot {n}": [] for n in range(4)}

    def write(self, tasks: list[Task]) -> None:
        self.written.extend(task.id for task in tasks)

    def run(self) -> None:
        """Walk until the job is over; fails when nobody holds a task and none can be leased."""
        while not self.ledger.over():
            slot = self.dice.choice(list(self.held))
            if not self.held[slot]:
                self.lease(slot)
            else:
                self.dice.choice([self.report, self.report, self.fail, self.release, self.vanish])(slot)
            self.most_waiting = max(self.most_waiting, self.settled - len(self.written))
            self.ledger.audit()

    def lease(self, slot: str) -> None:
        self.ledger.enlist(slot)
        lease = self.ledger.lease(slot, self.dice.randint(1, 6))
        assert lease or any(self.held.values()), f"nothing can be leased: {self.ledger.counts()}"
        self.held[slot] = [task.id for task in lease or []]

    def report(self, slot: str) -> None:
        self.take(slot, ok=True)

    def fail(self, slot: str) -> None:
        self.take(slot, ok=False)

    def take(self, slot: str, ok: bool) -> None:
        count = self.dice.randint(1, len(self.held[slot]))
        self.dice.shuffle(self.held[slot])
        reported, self.held[slot] = self.held[slot][:count], self.held[slot][count:]
        settled, _ = self.ledger.report(slot, [(task_id, ok, "x" * 100) for task_id in reported])
        self.record(settled)

    def release(self, slot: str) -> None:
        self.ledger.release(slot, self.held[slot])
        self.held[slot] = []

    def vanish(self, slot: str) -> None:
        _, given_up = self.ledger.drop(slot)
        self.held[slot] = []
        self.record(given_up)

    def record(self, settled: list[Task]) -> None:
        self.settled += len(settled)
        self.sequencer.write(settled)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(("window", "size"), [(1, 1 << 20), (7, 1 << 20), (50, 300)], ids=["one", "seven", "few bytes"])
def test_a_random_walk_ends_in_order_with_few_records_waiting(
    monkeypatch: pytest.MonkeyPatch, window: int, size: int, seed: int
) -> None:
    monkeypatch.setattr(task_master, "WINDOW", window)
    monkeypatch.setattr(task_master, "WINDOW_BYTES", size)
    walk = Walk(seed, 120, [], retries=seed % 3, redeliveries=seed % 4)
    walk.run()
    assert walk.written == list(range(120))
    assert walk.most_waiting <= window
    assert walk.ledger.counts()[DONE] == 120


@pytest.mark.parametrize("seed", range(10))
def test_a_random_walk_over_what_was_kept_ends_in_order(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(task_master, "WINDOW", 5)
    dice = random.Random(seed)
    walk = Walk(seed, 100, [dice.randint(0, 1) for _ in range(dice.randint(1, 110))], retries=1)
    walk.run()
    assert walk.written == walk.ids


def test_no_task_beyond_the_window_is_leased_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_master, "WINDOW", 3)
    ledger = Ledger()
    sequencer = Sequencer(ledger, lambda tasks: None, [])
    ledger.submit([(n, "0") for n in range(10)])
    assert [task.id for n in range(3) for task in ledger.lease(f"slot {n}", 1) or []] == [0, 1, 2]
    assert ledger.lease("another", 5) == []
    sequencer.write(ledger.report("slot 2", [(2, True, "")])[0])
    assert ledger.lease("another", 5) == []
    sequencer.write(ledger.report("slot 0", [(0, True, "")])[0])
    assert [task.id for task in ledger.lease("another", 1) or []] == [3]


SMALL_WINDOW = "import sys, task_master; task_master.WINDOW = 4; sys.exit(task_master.main())"


def test_a_real_job_goes_through_a_small_window(farm: Farm) -> None:
    farm.write_tasks(list(range(40)))
    argv = ["--tasks", "tasks.jsonl", "--ordered", "--results", "results.jsonl", "--workers", 3, "--function", "uneven:uneven"]
    env = farm.env(PYTHONPATH=task_master.__file__.rpartition("/")[0])
    master = farm.run("-c", SMALL_WINDOW, "--port", 0, *argv, env=env)
    assert master.wait() == 0, master.stderr
    assert ids(farm) == list(range(40))


# ---- the end comes early -------------------------------------------------------------------------------------------


def said_of_the_limit(master: Program) -> list[str]:
    """Lines about --max-failures, but for the command that carries on."""
    return [line for line in master.stderr if "--max-failures" in line and "to carry on" not in line]


def test_the_job_ends_at_the_last_failure_that_is_allowed(farm: Farm) -> None:
    farm.write_tasks(["no"] * 50)
    options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--batch", 1, "--max-failures", 3]
    master = farm.master(*options)
    worker = farm.worker(master, "--function", "functions:fail")
    assert (master.wait(), worker.wait()) == (1, 0)
    assert ids(farm) == [0, 1, 2]
    (line,) = said_of_the_limit(master)
    assert "stopped" in line
    assert "3 tasks" in line


def test_a_task_that_runs_when_the_last_failure_comes_is_finished(farm: Farm) -> None:
    farm.write_tasks([0, 1])
    options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--batch", 1, "--max-failures", 1]
    master = farm.master(*options)
    long = farm.worker(master, "--function", "uneven:late")
    long.wait_line("holds", "stdout")
    farm.worker(master, "--function", "functions:fail")
    master.wait_line("task 1 failed")
    (farm.folder / "go").touch()
    assert master.wait() == 1
    assert sorted(ids(farm)) == [0, 1]
    assert len(said_of_the_limit(master)) == 1


def test_one_failure_less_than_allowed_does_not_end_the_job(farm: Farm) -> None:
    master = run_ordered(farm, list(range(9)), "mixed", "--results", "results.jsonl", "--max-failures", 4)
    assert ids(farm) == list(range(9))
    assert said_of_the_limit(master) == []


def test_a_job_that_ended_early_says_how_to_resume(farm: Farm) -> None:
    farm.write_tasks(["no"] * 5)
    options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--workers", 1, "--function", "functions:fail"]
    master = farm.master(*options, "--max-failures", 1)
    assert master.wait() == 1
    assert any("to carry on:" in line and "--resume" in line for line in master.stderr)

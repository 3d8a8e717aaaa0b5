"""Children, workers and masters are killed at random moments: in the end every task is recorded exactly once.

CHAOS_SEEDS=20 CHAOS_TASKS=3000 in the environment is the long form; with `pytest -rP` each seed prints a line of figures.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import subprocess

import pytest
from lab import Farm, Program, check_once, check_silence, children_of

SEEDS = range(int(os.environ.get("CHAOS_SEEDS", 1)))
TASKS = int(os.environ.get("CHAOS_TASKS", 1000))
LEGAL_ERRORS = {"ProcessDied", "WorkerLost"}
CHAOS = """
import os
from functions import work

open(f"loaded-{os.getpid()}", "w").close()
"""

pytestmark = pytest.mark.timeout(120 + TASKS / 10)


class Chaos:
    """A job of one master and two workers of two processes, which are killed at moments that the seed decides."""

    def __init__(self, farm: Farm, seed: int, *options: object) -> None:
        self.farm, self.options = farm, options
        self.dice = random.Random(seed)
        self.kills: collections.Counter[str] = collections.Counter()
        self.masters: list[Program] = []
        self.port = 0
        farm.write("chaos.py", CHAOS)

    def start_master(self) -> None:
        resume = ["--resume"] * bool(self.masters)
        files = ("--tasks", "tasks.jsonl", "--results", "results.jsonl")
        self.masters.append(self.farm.run("task_master.py", "--port", self.port, *self.farm.tls, *files, *self.options, *resume))
        self.port = self.port or self.masters[0].port()

    def start_worker(self) -> Program:
        return self.farm.worker(self.port, "--processes", 2, "--function", "chaos:work")

    def run(self, master_kills: int = 0) -> None:
        """Run the job to its end and check what came of it. The master is killed `master_kills` times at most."""
        self.farm.write_tasks(range(TASKS))
        self.start_master()
        self.workers = [self.start_worker(), self.start_worker()]
        started = 0
        while self.masters[-1].is_running():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.masters[-1].process.wait(self.dice.uniform(0.05, 0.3))
                break
            if len(self.farm.started()) < started + 10:
                continue  # a busy machine must get on, too
            started = len(self.farm.started())
            if master_kills and self.dice.random() < 0.4:
                self.kill_master()
                master_kills -= 1
            elif self.dice.random() < 0.6:
                self.kill_child()
            else:
                self.kill_worker()
            self.replace_workers()
        self.check()

    def kill_master(self) -> None:
        if self.masters[-1].is_running():
            self.masters[-1].kill()
            self.kills["master"] += 1
            self.start_master()

    def kill_child(self) -> None:
        """One that has loaded the function: a worker gives up when a child is killed again and again before it has."""
        loaded = [pid for pid in children_of(self.dice.choice(self.workers).pid) if (self.farm.folder / f"loaded-{pid}").exists()]
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(self.dice.choice(loaded), signal.SIGKILL)
            self.kills["child"] += 1

    def kill_worker(self) -> None:
        worker = self.dice.choice(self.workers)
        if worker.is_running():
            worker.kill()
            self.kills["worker"] += 1

    def replace_workers(self) -> None:
        """Start one for each that was killed; none may have gone by itself while there was work."""
        for number, worker in enumerate(self.workers):
            if worker.is_running() or not self.masters[-1].is_running():
                continue
            assert worker.process.returncode <= 0, f"a worker must outlive its children: {worker.stderr}"
            self.workers[number] = self.start_worker()

    def check(self) -> None:
        """Every task has exactly one record, which is right; and what was killed is all that failed."""
        status = self.masters[-1].wait()
        assert (self.farm.folder / "results.jsonl").read_bytes().endswith(b"\n"), "the last line is torn"
        records = self.farm.records()
        check_once(records, TASKS)
        assert all(record["task"] == record["id"] for record in records)
        assert all(record["result"] == 2 * record["id"] for record in records if "error" not in record)
        self.failed = collections.Counter(record["error"]["type"] for record in records if "error" in record)
        assert set(self.failed) <= LEGAL_ERRORS
        assert status == (1 if self.failed else 0)
        check_silence(*self.masters)
        print(f"killed {dict(self.kills)}; failed {dict(self.failed)}; started {len(self.farm.started())} of {TASKS}")


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_children_and_workers_lose_no_task_and_repeat_no_record(any_farm: Farm, seed: int) -> None:
    chaos = Chaos(any_farm, seed)
    chaos.run()
    assert chaos.kills["child"] and chaos.kills["worker"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_master_killed_and_resumed_again_and_again_loses_no_task_and_repeats_no_record(any_farm: Farm, seed: int) -> None:
    chaos = Chaos(any_farm, seed)
    chaos.run(master_kills=5)
    assert chaos.kills["master"]


def test_with_no_redeliveries_no_task_is_started_twice_however_workers_are_killed(any_farm: Farm) -> None:
    chaos = Chaos(any_farm, 5, "--redeliveries", 0)
    chaos.run()
    assert chaos.kills["worker"] and chaos.failed["WorkerLost"]
    ids = any_farm.started()
    assert len(ids) == len(set(ids))

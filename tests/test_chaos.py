"""Children, workers and masters are killed at random moments: in the end every task is recorded exactly once.

    python tests/test_chaos.py --seeds 20 --tasks 3000

runs the long form of both tests and prints a line of figures for each seed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Farm, Program, children_of

CHAOS = """
import time

def work(n):
    time.sleep(n * 7919 % 10 / 1000)  # 4.5 ms on average
    return 2 * n
"""
LEGAL_ERRORS = {"ProcessDied", "WorkerLost"}


class Chaos:
    """A job of one master and two workers of two processes, which are killed at moments that the seed decides."""

    def __init__(self, farm: Farm, seed: int, function: str = "chaos:work", *options: object) -> None:
        self.farm, self.function, self.options = farm, function, options
        self.dice = random.Random(seed)
        self.kills: collections.Counter[str] = collections.Counter()
        self.left: list[str] = []  # what workers said last that ended without being killed
        self.masters: list[Program] = []
        self.port = 0
        (farm.folder / "chaos.py").write_text(CHAOS)

    def start_master(self) -> None:
        options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", *self.options]
        if self.masters:
            options.append("--resume")
        self.masters.append(self.farm.run("task_master.py", "--port", self.port, *self.farm.tls, *options))
        self.port = self.port or self.masters[0].port()

    def start_worker(self) -> Program:
        return self.farm.run("task_worker.py", "--port", self.port, *self.farm.tls, "--processes", 2, "--function", self.function)

    def run(self, tasks: int, master_kills: int = 0, pause: tuple[float, float] = (0.05, 0.5)) -> int:
        """Run the job to its end; returns the last master's exit status. The master is killed `master_kills` times."""
        self.farm.write_tasks(list(range(tasks)))
        self.start_master()
        self.workers = [self.start_worker(), self.start_worker()]
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.masters[-1].process.wait(self.dice.uniform(*pause))
                return self.masters[-1].wait()
            if master_kills and self.dice.random() < 0.4:
                self.kill_master()
                master_kills -= 1
            elif self.dice.random() < 0.6:
                self.kill_child()
            else:
                self.kill_worker()
            self.replace_workers()

    def kill_master(self) -> None:
        if self.masters[-1].process.poll() is None:
            self.masters[-1].kill()
            self.kills["master"] += 1
            self.start_master()

    def kill_child(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, IndexError):
            os.kill(self.dice.choice(children_of(self.dice.choice(self.workers).pid)), signal.SIGKILL)
            self.kills["child"] += 1

    def kill_worker(self) -> None:
        worker = self.dice.choice(self.workers)
        if worker.process.poll() is None:
            worker.kill()
            self.kills["worker"] += 1

    def replace_workers(self) -> None:
        """Start one for each that is gone; note those that went by themselves while there was work."""
        for number, worker in enumerate(self.workers):
            if worker.process.poll() is None or self.masters[-1].process.poll() is not None:
                continue
            if worker.process.returncode > 0:
                worker.wait()
                self.left.append(worker.stderr[-1] if worker.stderr else "nothing")
            self.workers[number] = self.start_worker()

    def redelivered(self) -> int:
        """How many tasks the masters said that they redeliver."""
        lines = [line for master in self.masters for line in master.stderr if "redelivered since" in line]
        shown = sum(len(re.findall(r"\d+ \(attempt", line)) for line in lines)
        return shown + sum(int(match.group(1)) for line in lines if (match := re.search(r" and (\d+) more$", line)))

    def check(self, tasks: int, status: int) -> list[dict[str, Any]]:
        """Every task has exactly one record, which is right; returns the failed ones."""
        lines = (self.farm.folder / "results.jsonl").read_bytes().split(b"\n")
        assert lines.pop() == b"", "the last line is torn"
        records = [json.loads(line) for line in lines]
        assert sorted(record["id"] for record in records) == list(range(tasks))
        assert all(record["task"] == record["id"] for record in records)
        assert all(record["result"] == 2 * record["id"] for record in records if "error" not in record)
        failed = [record for record in records if "error" in record]
        assert {record["error"]["type"] for record in failed} <= LEGAL_ERRORS
        assert status == (1 if failed else 0)
        assert not any("Traceback" in line for master in self.masters for line in master.stderr)
        return failed


def check_nothing_left_by_itself(chaos: Chaos) -> None:
    assert not chaos.left, "a worker must outlive its children"


@pytest.mark.parametrize("seed", [3])
def test_killed_children_and_workers_lose_no_task_and_repeat_no_record(farm: Farm, seed: int) -> None:
    chaos = Chaos(farm, seed)
    status = chaos.run(1000, pause=(0.05, 0.3))
    chaos.check(1000, status)
    assert chaos.kills["child"] and chaos.kills["worker"]
    check_nothing_left_by_itself(chaos)


@pytest.mark.parametrize("seed", [4])
def test_a_master_killed_and_resumed_again_and_again_loses_no_task_and_repeats_no_record(farm: Farm, seed: int) -> None:
    chaos = Chaos(farm, seed)
    status = chaos.run(1000, master_kills=3, pause=(0.05, 0.4))
    chaos.check(1000, status)
    assert chaos.kills["master"]
    check_nothing_left_by_itself(chaos)


def run_seed(seed: int, tasks: int, master_kills: int) -> str:
    """The long form for one seed; returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        farm = Farm(Path(folder))
        chaos = Chaos(farm, seed)
        try:
            began_at = time.monotonic()
            status = chaos.run(tasks, master_kills)
            seconds = time.monotonic() - began_at
            failed = chaos.check(tasks, status)
        finally:
            farm.close()
    kinds = collections.Counter(record["error"]["type"] for record in failed)
    kills = ", ".join(f"{chaos.kills[what]} {what}" for what in ("child", "worker", "master"))
    return f"seed {seed:2}: killed {kills}; redelivered {chaos.redelivered()}, failed records {dict(kinds)}, {seconds:.1f} s" + (
        f"; LEFT BY THEMSELVES {chaos.left}" if chaos.left else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The long form of the chaos tests.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=3000)
    options = parser.parse_args()
    for master_kills in (0, 5):
        print(f"{options.tasks} tasks, the master killed up to {master_kills} times", flush=True)
        for seed in range(options.first, options.first + options.seeds):
            print(run_seed(seed, options.tasks, master_kills), flush=True)


if __name__ == "__main__":
    main()

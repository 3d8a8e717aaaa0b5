"""Whatever is killed, stopped or cut: each task is recorded once, or begun once if that is asked for; a seed decides what comes.

CHAOS_SEEDS=20 CHAOS_ROUNDS=10 in the environment is the long form; with `pytest -rP` each seed prints a line of figures.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess

import psutil
import pytest
from lab import Farm, Program, Relay, check_silence, wait_until

SEEDS = range(int(os.environ.get("CHAOS_SEEDS", 1)))
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", 1))  # how often each of these happens:
KINDS = "kill a child,kill a worker,kill a worker proper,stop a worker,stop the master,cut the cables,kill the master".split(",")
MODULE = """
import os
from functions import work

open(f"loaded-{os.getpid()}", "w").close()
"""

pytestmark = pytest.mark.timeout(300 + 60 * ROUNDS)


class Storm:
    """A job of one master and two workers of two processes, whose tasks come as long as something is to happen."""

    def __init__(self, farm: Farm, seed: int, *options: object) -> None:
        self.farm, self.dice, self.options = farm, random.Random(seed), options
        self.masters: list[Program] = []
        self.count = self.port = 0
        self.start_master()
        self.relay = farm.closing(Relay(self.port))
        self.workers = [self.start_worker(), self.start_worker()]

    def start_master(self) -> None:
        """Start it, or another one on the same port, with the tasks that there were so far."""
        argv = ("--port", self.port, *self.farm.tls, "--tasks", "-", "--results", "results.jsonl", *self.options)
        resume = ["--resume"] * bool(self.masters)
        self.masters.append(self.farm.run("task_master.py", *argv, *resume, stdin=subprocess.PIPE))
        self.port = self.masters[-1].port()
        self.masters[-1].put("".join(f"{n}\n" for n in range(self.count)))

    def start_worker(self) -> Program:
        return self.farm.worker(self.relay.port, "--processes", 2, "--function", "mod:work")

    def run(self, kinds: list[str]) -> collections.Counter[str]:
        """Let all this happen while there is work, then the job end; returns how many tasks failed, by type of error."""
        for kind in self.dice.sample(kinds * ROUNDS, len(kinds) * ROUNDS):
            begun = len(self.farm.started())
            self.masters[-1].put("".join(f"{n}\n" for n in range(self.count, self.count + 200)))
            self.count += 200
            self.wait_started(begun + self.dice.randrange(10, 150))
            self.act(kind)
        self.masters[-1].end_input()
        return self.check()

    def wait_started(self, count: int) -> None:
        """Block until so many tasks were started; no worker may go by itself, say because its child was killed."""
        wait_until(lambda: len(self.farm.started()) >= count, self.masters[-1], *self.workers)

    def act(self, kind: str) -> None:
        worker = self.dice.choice(self.workers)
        if kind == "cut the cables":
            self.relay.cut()
        elif kind == "kill the master":
            self.masters[-1].kill()
            self.start_master()
        elif kind == "kill a child":
            os.kill(self.dice.choice(wait_until(lambda: self.loaded(worker), worker)), signal.SIGKILL)
        elif kind.startswith("stop"):
            program = worker if kind == "stop a worker" else self.masters[-1]
            program.suspend()
            program.pause(0.5)
            program.resume()
        else:
            proper = wait_until(lambda: psutil.Process(worker.pid).children(), worker)[0]
            (worker.process if kind == "kill a worker" else proper).kill()
            worker.wait()
            self.workers[self.workers.index(worker)] = self.start_worker()

    def loaded(self, worker: Program) -> list[int]:
        """The children that have loaded the function: a worker gives up when one is killed again and again before it has."""
        return [child.pid for child in worker.children() if (self.farm.folder / f"loaded-{child.pid}").exists()]

    def check(self) -> collections.Counter[str]:
        """Every task has exactly one record, which is right."""
        status, records = self.masters[-1].wait(), self.farm.records()
        ids = [record["id"] for record in records]
        assert (ids if "--ordered" in self.options else sorted(ids)) == list(range(self.count))
        assert all(record["task"] == record["id"] for record in records)
        assert all(record["result"] == 2 * record["id"] for record in records if "error" not in record)
        failed = collections.Counter(record["error"]["type"] for record in records if "error" in record)
        assert status == (1 if failed else 0)
        check_silence(*self.masters)
        print(f"failed {dict(failed)}; started {len(self.farm.started())} of {self.count}")
        return failed


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_no_task_is_lost_and_each_is_recorded_once(any_farm: Farm, seed: int) -> None:
    storm = Storm(any_farm, seed, "--redeliveries", 1000, *["--ordered"] * (seed % 2 == 0))
    assert set(storm.run(KINDS)) <= {"ProcessDied"}
    assert {*map(int, any_farm.started())} == {*range(storm.count)}


@pytest.mark.parametrize("seed", SEEDS)
def test_with_no_redeliveries_no_task_is_started_twice_whatever_happens(any_farm: Farm, seed: int) -> None:
    failed = Storm(any_farm, seed, "--redeliveries", 0).run(KINDS[:-1])  # a killed master does not know what it had leased
    assert set(failed) <= {"WorkerLost", "ProcessDied"}
    assert len(any_farm.started()) == len({*any_farm.started()})

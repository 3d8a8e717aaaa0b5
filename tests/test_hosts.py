"""A host that vanishes and a process that stops are noticed within a minute on both sides; one that is only busy never is.

All of it takes that minute of waiting, so it is all waited for at the same time, beside the tests of other files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from lab import LEASE, ROOT, TASKS, Farm, Program, wait_until

pytestmark = pytest.mark.early

PROMISE = 60  # seconds within which a silent peer is noticed
LONG = 2 * PROMISE  # seconds after which it counts as unnoticed; generous, the machine is noisy
CUT = 12  # seconds without a link that are survived

MODULE = r'''
import ctypes, os
from functions import note, stay

def work(task):
    """Takes until there is a file `go` on the far host; no time on any other."""
    note(os.environ["HOST"])
    if os.environ["HOST"] == "far":
        stay(task)
    return os.environ["HOST"]

def hold(seconds):
    """Sleep in C without letting any other thread of this process run."""
    ctypes.PyDLL(None).sleep(int(seconds))
    return seconds
'''


class Cable:
    """Two hosts, each a network namespace, and the cable between them; skips the test where these cannot be had."""

    numbers = itertools.count()
    address = "10.213.0.1"  # of the near one, as the far one sees it; nobody else does

    def __enter__(self) -> Cable:
        self.near, self.far = [f"tm{os.getpid()}n{next(self.numbers)}" for _ in range(2)]
        if not shutil.which("ip"):
            pytest.skip("there is no `ip` command")
        try:
            for name in (self.near, self.far):
                self.ip("netns", "add", name)
                self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", self.near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self.far)
            for name, address in ((self.near, self.address), (self.far, "10.213.0.2")):
                self.ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                self.ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        return self

    def __exit__(self, *exception: object) -> None:
        for name in (self.near, self.far):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.ip("netns", "delete", name)

    @staticmethod
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def cut(self) -> None:
        self.ip("-n", self.far, "link", "set", "cable", "down")

    def mend(self) -> None:
        self.ip("-n", self.far, "link", "set", "cable", "up")


class Scene:
    """A master on the near host, and workers, whose functions know where they are; it may all be the same host."""

    def __init__(self, farm: Farm, *options: object, cable: Cable | None = None, **more: Any) -> None:
        self.farm, self._cable = farm, cable
        self._where = ("--no-tls", "--host", cable.address) if cable else ()
        self.master = self._start("near", "task_master.py", "--port", 0, "--results", "results.jsonl", *options, **more)

    def _start(self, host: str, file: str, *options: object, **more: Any) -> Program:
        place = ["ip", "netns", "exec", getattr(self._cable, host)] if self._cable else []
        command = [*place, sys.executable, str(ROOT / file), *map(str, [*self._where, *options])]
        return self.farm.start(command, env=self.farm.env(HOST=host), **more)

    def worker(self, host: str, function: str = "mod:work") -> Program:
        """One that is connected."""
        options = ("--port", self.master.port(), "--processes", 1, "--function", function)
        worker = self._start(host, "task_worker.py", *options)
        worker.wait_line("connected")
        return worker

    def busy_worker(self, function: str = "mod:work") -> Program:
        """One on the far host, in the middle of the only task."""
        worker = self.worker("far", function)
        self.farm.wait_started(worker, "far")
        return worker

    def check_record(self, result: object, attempts: int) -> None:
        """The record of the only task, once the job is over."""
        assert self.master.wait(LONG) == 0, self.master.stderr
        (record,) = self.farm.records()
        assert (record["result"], record["attempts"]) == (result, attempts)


def test_a_link_that_goes_down_while_all_is_quiet_is_noticed_by_both_ends_and_another_worker_does_the_task(farm: Farm) -> None:
    with Cable() as cable:
        scene = Scene(farm, 1, cable=cable)
        far = scene.busy_worker()
        scene.worker("near")
        cable.cut()
        scene.master.wait_line(f"redelivered since {far.name()} was lost", timeout=LONG)
        scene.check_record("near", attempts=2)
        far.wait_line("lost the master", timeout=LONG)


def test_a_link_that_goes_down_with_data_on_the_way_is_noticed_by_both_ends_and_another_worker_does_the_task(farm: Farm) -> None:
    """The far worker waits for a task: it is sent, or the word that there is none yet, and is never acknowledged."""
    with Cable() as cable:
        scene = Scene(farm, "--tasks", "-", cable=cable, stdin=subprocess.PIPE)
        far = scene.worker("far")
        cable.cut()
        scene.master.put("1\n")
        scene.worker("near")
        scene.master.wait_line(f"{far.name()} (was lost|disconnected)", timeout=LONG)
        far.wait_line("lost the master", timeout=LONG)
        scene.master.end_input()
        scene.check_record("near", attempts=1 + bool(scene.master.said("redelivered since")))


def test_a_link_that_comes_back_in_time_costs_nothing(farm: Farm) -> None:
    with Cable() as cable:
        scene = Scene(farm, 1, cable=cable)
        far = scene.busy_worker()
        scene.worker("near")
        cable.cut()
        scene.master.pause(CUT)
        cable.mend()
        farm.let_go()
        scene.check_record("far", attempts=1)
        assert not far.said("lost")


def test_a_worker_that_stops_is_noticed_and_another_one_finishes_its_task(farm: Farm) -> None:
    scene = Scene(farm, 1)
    far = scene.busy_worker()
    scene.worker("near")
    far.suspend()
    scene.master.wait_line("redelivered since", timeout=LONG)
    scene.check_record("near", attempts=2)


def test_a_worker_that_stops_with_data_on_the_way_is_noticed_and_another_one_finishes_its_task(farm: Farm) -> None:
    """A slot asks for a task that fills its buffers, and reads none of it."""
    scene = Scene(farm, "--tasks", farm.write_tasks(["x" * 20_000_000]))
    peer = farm.peer(scene.master).join()
    wait_until(peer.qsize, scene.master)  # it takes a while to read
    peer.ask(TASKS, LEASE, 1, 20.0)
    assert peer.connection.poll(LONG)
    scene.worker("near")
    scene.master.wait_line("redelivered since", timeout=LONG)
    scene.check_record("near", attempts=2)


def test_a_task_that_lets_no_other_thread_run_does_not_cost_its_lease(farm: Farm) -> None:
    scene = Scene(farm, PROMISE + 2)
    for host in ("far", "near"):
        scene.worker(host, "mod:hold")
    scene.check_record(PROMISE + 2, attempts=1)
    assert farm.records()[0]["seconds"] > PROMISE

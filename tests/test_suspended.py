"""A master or a reader that stands still for a while costs nobody anything; signals get through all the same.

What stands still is started first and looked at last: the other tests here run meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import Farm, Program, check_ended, check_once, check_silence, wait_until

pytestmark = pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="needs pipes whose size can be set")

STANDSTILL = float(os.environ.get("SUSPENDED_SECONDS", "80"))
LARGE = 30_000_000  # characters of a result that does not fit into the buffers of the network
RESULTS = ("--results", "results.jsonl")
STAY = ("--function", "functions:stay")
WORK = ("--function", "mod:work")

MODULE = f"""
import os, time
from functions import note

def work(task):
    '''A word takes until there is a file of that name, a number 20 ms.'''
    note(task)
    time.sleep(0.02)
    while isinstance(task, str) and not os.path.exists(task):
        time.sleep(0.01)
    return "x" * {LARGE} if task == "large" else task
"""


class Pipe:
    """A pipe of a page that is read only when a test says so."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_inheritable(self.writer, True)

    def fill(self) -> None:
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b".")
        os.set_blocking(self.writer, True)

    def wait_full(self) -> None:
        wait_until(lambda: not select.select([], [self.writer], [], 0)[1])

    def read(self) -> bytes:
        """All that is written until nobody can write any more."""
        os.close(self.writer)
        with open(self.reader, "rb") as reader:
            return reader.read()


class Standstill:
    """A stopped master with workers of all sorts, and masters whose standard output nobody reads, one of large results."""

    def __init__(self, folder: Path) -> None:
        self.farms = [Farm(folder / name, MODULE) for name in ("stopped", "unread", "large")]
        self.farm, self.unread_farm, large_farm = self.farms
        self.master = self.farm.master("--tasks", "-", *RESULTS, "--workers", 1, *WORK, stdin=subprocess.PIPE)
        self.workers = []
        for task in ("meanwhile", "large", "go"):  # the local worker gets the first of them
            self.master.put(f'"{task}"\n')
            self.farm.wait_started(self.master, task)
            self.workers.append(self.farm.worker(self.master, *WORK, "--wait", 300))
        self.master.put("0\n")  # then the last worker is idle
        self.farm.wait_records(self.master, 1)
        self.master.signal(signal.SIGSTOP)
        for name in ("meanwhile", "large"):
            (self.farm.folder / name).touch()
        large_farm.write("large", "")
        self.unread, self.pipe = self.start_unread(self.unread_farm, [*range(100)])
        self.large, self.large_pipe = self.start_unread(large_farm, ["large"] * 4, "--redeliveries", 0)
        self.began_at = time.monotonic()

    def start_unread(self, farm: Farm, tasks: list[Any], *options: object) -> tuple[Program, Pipe]:
        """A master whose standard output is full."""
        pipe = Pipe()
        argv = ("--port", 0, "--tasks", farm.write_tasks(tasks), "--results", "-", "--workers", 3, *WORK, *options)
        master = farm.run_after(f"os.dup2({pipe.writer}, 1)", "task_master.py", *argv, pass_fds=[pipe.writer])
        master.port()
        pipe.wait_full()
        return master, pipe

    def wait(self) -> None:
        """Block until all has stood still for long enough."""
        self.master.pause(max(0.0, self.began_at + STANDSTILL - time.monotonic()))


@pytest.fixture(scope="module", autouse=True)
def standstill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standstill]:
    standstill = Standstill(tmp_path_factory.mktemp("standstill"))
    yield standstill
    for farm in standstill.farms:
        farm.close()


def test_a_hangup_that_was_ignored_stays_so(farm: Farm) -> None:
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # what nohup does
    options = ("--tasks", "-", *RESULTS, "--workers", 1, *STAY)
    master = farm.run_after(ignore, "task_master.py", "--port", 0, *options, stdin=subprocess.PIPE)
    worker = farm.run_after(ignore, "task_worker.py", "--port", master.port(), "--processes", 1, *STAY)
    master.put("1\n2\n")
    wait_until(lambda: len(farm.started()) == 2, master, worker)
    for process in [*master.descendants(), *worker.descendants(), worker, master]:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGHUP)
    farm.let_go()
    master.give([3])
    assert (master.wait(), worker.wait()) == (0, 0)
    assert [record["attempts"] for record in farm.records()] == [1, 1, 1]
    assert not master.said("draining") + worker.said("draining")


def test_a_terminal_that_goes_away_drains_the_job_and_leaves_nothing(farm: Farm) -> None:
    """Whatever is written there fails from then on."""
    ours, theirs = pty.openpty()
    take = f"fcntl.ioctl({theirs}, termios.TIOCSCTTY, 0)\nfor fd in (0, 1, 2): os.dup2({theirs}, fd)"
    master = farm.run_after(take, "task_master.py", "--port", 0, *RESULTS, "--workers", 1, *STAY, 1, 2, 3, pass_fds=[theirs])
    os.close(theirs)
    farm.wait_started(master)
    processes = master.descendants()
    os.close(ours)
    with contextlib.suppress(subprocess.TimeoutExpired):
        master.process.wait(1)
    farm.let_go()
    assert master.wait() in (0, 129)  # 0: all was done before it came through
    check_ended(processes)
    assert 1 in [record["result"] for record in farm.records()]


@pytest.mark.parametrize("whom", ["master", "worker"])
def test_an_exit_status_counts_though_the_parent_ignores_the_end_of_children(farm: Farm, whom: str) -> None:
    ignore, what = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)", ("--command", "exit {}")
    local = ("--workers", 1, *what) if whom == "master" else ()
    master = farm.run_after(ignore, "task_master.py", "--port", 0, *RESULTS, *local, "0", "3")
    if whom == "worker":
        farm.run_after(ignore, "task_worker.py", "--port", master.port(), "--processes", 1, *what)
    assert master.wait() == 1
    first, second = farm.records()
    assert "result" in first and second["error"]["exit"] == 3


@pytest.mark.parametrize("descriptor", [1, 2], ids=["standard output", "standard error"])
@pytest.mark.parametrize("program", ["task_master.py", "task_worker.py"])
def test_the_second_signal_ends_a_program_whose_output_is_blocked(farm: Farm, program: str, descriptor: int) -> None:
    """The message about the first signal, too, waits in the full pipe while the second one comes."""
    pipe, is_master = Pipe(), program == "task_master.py"
    options = ["--port", 0, "--workers", 1, 1] if is_master else ["--port", farm.master("1").port(), "--processes", 1]
    blocked = farm.run_after(f"os.dup2({pipe.writer}, {descriptor})", program, *options, *STAY, pass_fds=[pipe.writer])
    farm.wait_started(blocked)
    pipe.fill()
    farm.let_go()  # what is printed then blocks, too
    for number in (signal.SIGINT, signal.SIGTERM):
        blocked.signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            blocked.process.wait(0.5)
    assert blocked.wait() in (0, 130, 143)  # at the latest with the second one
    assert b"Traceback" not in pipe.read()
    check_silence(blocked)


def test_a_worker_comes_and_goes_while_nobody_reads_the_records(standstill: Standstill) -> None:
    worker = standstill.unread_farm.worker(standstill.unread, *WORK)
    worker.wait_line("connected to")
    worker.drain()
    worker.signal(signal.SIGTERM)  # since it may wait until somebody reads what it has reported
    assert worker.wait() in (0, 143)
    assert standstill.unread.is_running()


def test_records_that_nobody_read_for_a_while_come_once_each(standstill: Standstill) -> None:
    standstill.wait()
    records = [json.loads(line) for line in standstill.pipe.read().splitlines()]
    assert standstill.unread.wait() == 0
    check_once(records, 100)
    assert all(record["result"] == record["task"] and record["attempts"] in (1, 2) for record in records)


def test_large_results_that_wait_for_each_other_are_not_lost(standstill: Standstill) -> None:
    standstill.wait()
    records = [json.loads(line) for line in standstill.large_pipe.read().splitlines()]
    assert standstill.large.wait() == 0, standstill.large.stderr
    assert [(len(record["result"]), record["attempts"]) for record in records] == [(LARGE, 1)] * 4


def test_a_master_that_was_stopped_goes_on_with_all_its_workers(standstill: Standstill) -> None:
    standstill.wait()
    farm, master, workers = standstill.farm, standstill.master, standstill.workers
    assert all(worker.is_running() for worker in workers), "they have waited"
    master.signal(signal.SIGCONT)
    farm.let_go()
    farm.wait_records(master, 4)
    master.give(range(20))
    assert [program.wait() for program in [master, *workers]] == [0] * 4
    farm.check_once(24)
    assert all(record["result"] == ("x" * LARGE if record["task"] == "large" else record["task"]) for record in farm.records())
    check_silence(master)

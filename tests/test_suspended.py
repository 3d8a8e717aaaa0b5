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
import shlex
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import PATIENCE, ROOT, Farm, Program

pytestmark = [
    pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="needs pipes whose size can be set"),
    pytest.mark.timeout(300),
]

STANDSTILL = float(os.environ.get("SUSPENDED_SECONDS", "80"))
LARGE = 30_000_000  # characters of a result that does not fit into the buffers of the network

FUNCTIONS = f'''
import os, subprocess, time

def work(task):
    """A string takes until there is a file of that name, a number 20 ms."""
    if not isinstance(task, str):
        time.sleep(0.02)
    else:
        open(f"{{task}}-{{os.getpid()}}.begun", "w").close()
        while not os.path.exists(task):
            time.sleep(0.01)
    return "x" * {LARGE} if task == "stopped" else task

def count(task):
    """The exit status of a program."""
    return subprocess.run(["sh", "-c", f"exit {{task}}"]).returncode
'''


@pytest.fixture
def farm(farm: Farm) -> Iterator[Farm]:
    (farm.folder / "suspended.py").write_text(FUNCTIONS)
    yield farm
    (farm.folder / "go").touch()
    for program in farm.programs:
        close_input(program)


def close_input(program: Program) -> None:
    if program.process.stdin:
        with contextlib.suppress(BrokenPipeError):
            program.process.stdin.close()


def put(master: Program, text: str) -> None:
    master.process.stdin.write(text.encode())
    master.process.stdin.flush()


def run_after(farm: Farm, preparation: str, *argv: object, **options: Any) -> Program:
    """Start a program in a process that has done something before."""
    code = f"import fcntl, os, signal, sys\n{preparation}\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return farm.run("-c", code, ROOT / str(argv[0]), *argv[1:], **options)


def wait_begun(farm: Farm, program: Program, task: str, count: int = 1) -> None:
    """Block until so many processes run the task."""
    give_up_at = time.monotonic() + PATIENCE
    while len(list(farm.folder.glob(f"{task}-*.begun"))) < count:
        assert time.monotonic() < give_up_at and program.process.poll() is None, program.lines
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(0.02)


class Pipe:
    """A pipe of a page that is read only when a test says so."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.size = fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_inheritable(self.writer, True)

    def fill(self) -> None:
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b".")
        os.set_blocking(self.writer, True)

    def wait_full(self) -> None:
        give_up_at = time.monotonic() + PATIENCE
        while select.select([], [self.writer], [], 0)[1]:
            assert time.monotonic() < give_up_at
            time.sleep(0.02)

    def read_until(self, text: bytes) -> bytes:
        said = b""
        while text not in said:
            assert select.select([self.reader], [], [], PATIENCE)[0], said
            said += os.read(self.reader, self.size)
        return said

    def read(self) -> bytes:
        """All that is written until nobody can write any more."""
        os.close(self.writer)
        with open(self.reader, "rb") as reader:
            return reader.read()


# ---- what stands still -----------------------------------------------------------------------------------------------


class Standstill:
    """A stopped master with workers of all sorts, and a master whose standard output nobody reads."""

    def __init__(self, folder: Path) -> None:
        for name in ("stopped", "unread"):
            (folder / name).mkdir()
        self.farm, self.unread_farm = Farm(folder / "stopped"), Farm(folder / "unread")
        for farm in (self.farm, self.unread_farm):
            (farm.folder / "suspended.py").write_text(FUNCTIONS)
        what = ("--workers", 1, "--function", "suspended:work")
        self.master = self.farm.master("--tasks", "-", "--results", "results.jsonl", *what, stdin=subprocess.PIPE)
        self.workers = []
        for task in ("meanwhile", "stopped", "go", 0):  # the local worker gets the first of them, and the last worker is idle
            put(self.master, json.dumps(task) + "\n")
            if task:
                wait_begun(self.farm, self.master, str(task))
                self.workers.append(self.farm.worker(self.master, "--function", "suspended:work", "--wait", 300))
        self.wait_records(1)
        self.master.signal(signal.SIGSTOP)
        for name in ("meanwhile", "stopped"):
            (self.farm.folder / name).touch()

        self.pipe = Pipe()
        self.unread_farm.write_tasks(list(range(100)))
        redirect = f"os.dup2({self.pipe.writer}, 1)"
        options = ("--port", 0, "--tasks", "tasks.jsonl", "--results", "-", *what)
        self.unread = run_after(self.unread_farm, redirect, "task_master.py", *options, pass_fds=[self.pipe.writer])
        self.unread.port()
        self.pipe.wait_full()
        self.began_at = time.monotonic()

    def wait_records(self, count: int) -> None:
        path, give_up_at = self.farm.folder / "results.jsonl", time.monotonic() + PATIENCE
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < give_up_at, self.master.stderr
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.master.process.wait(0.02)

    def wait(self) -> None:
        """Block until all has stood still for long enough."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.unread.process.wait(max(0.0, self.began_at + STANDSTILL - time.monotonic()))

    def close(self) -> None:
        close_input(self.master)
        (self.farm.folder / "go").touch()
        for farm in (self.farm, self.unread_farm):
            farm.close()


@pytest.fixture(scope="module", autouse=True)
def standstill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standstill]:
    standstill = Standstill(tmp_path_factory.mktemp("standstill"))
    yield standstill
    standstill.close()


# ---- a dropped session, and what the parent has ignored --------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_a_signal_ends_the_master_and_it_says_how_to_resume(farm: Farm, number: int, twice: bool) -> None:
    farm.write_tasks(["go", *range(100)])
    what = ("--workers", 1, "--function", "suspended:work")
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", *what)
    wait_begun(farm, master, "go")
    master.signal(number)
    master.wait_line("draining")
    if twice:
        master.signal(number)
    else:
        (farm.folder / "go").touch()
    assert master.wait() == 128 + number
    (farm.folder / "go").touch()
    again = Program(shlex.split(master.wait_line("to carry on: (.*)$").group(1)), farm.folder, farm.env())
    farm.programs.append(again)
    assert again.wait() == 0
    assert sorted(record["id"] for record in farm.records()) == list(range(101))


def test_a_hangup_drains_a_worker(farm: Farm) -> None:
    master = farm.master('"go"', "1", "--results", "results.jsonl")
    worker = farm.worker(master, "--function", "suspended:work")
    wait_begun(farm, worker, "go")
    worker.signal(signal.SIGHUP)
    worker.wait_line("draining")
    (farm.folder / "go").touch()
    assert worker.wait() == 0
    assert (farm.worker(master, "--function", "suspended:work").wait(), master.wait()) == (0, 0)
    assert [record["attempts"] for record in farm.records()] == [1, 1]


def test_a_hangup_that_was_ignored_stays_so(farm: Farm) -> None:
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # what nohup does
    options = ("--tasks", "-", "--results", "results.jsonl", "--workers", 1, "--function", "suspended:work")
    master = run_after(farm, ignore, "task_master.py", "--port", 0, *options, stdin=subprocess.PIPE)
    worker = run_after(farm, ignore, "task_worker.py", "--port", master.port(), "--processes", 1, *options[-2:])
    put(master, '"go"\n"go"\n')
    wait_begun(farm, master, "go", 2)
    for process in psutil.Process(master.pid).children(recursive=True) + psutil.Process(worker.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGHUP)
    for program in (worker, master):
        program.signal(signal.SIGHUP)
    (farm.folder / "go").touch()
    put(master, "1\n")
    master.process.stdin.close()
    assert (master.wait(), worker.wait()) == (0, 0)
    assert [record["attempts"] for record in farm.records()] == [1, 1, 1]
    assert not any("draining" in line for line in master.stderr + worker.stderr)


def test_a_terminal_that_goes_away_drains_the_job_and_leaves_nothing(farm: Farm) -> None:
    """Whatever is written there fails from then on."""
    ours, theirs = pty.openpty()
    take = f"fcntl.ioctl({theirs}, {termios.TIOCSCTTY}, 0)\nfor fd in (0, 1, 2): os.dup2({theirs}, fd)"
    options = ("--port", 0, "--tasks", farm.write_tasks(["go", 1, 2]), "--results", "results.jsonl", "--workers", 1)
    master = run_after(farm, take, "task_master.py", *options, "--function", "suspended:work", pass_fds=[theirs])
    os.close(theirs)
    wait_begun(farm, master, "go")
    processes = psutil.Process(master.pid).children(recursive=True)
    os.close(ours)
    with contextlib.suppress(subprocess.TimeoutExpired):
        master.process.wait(1)
    (farm.folder / "go").touch()
    assert master.wait() in (0, 129)  # 0: all was done before it came through
    assert psutil.wait_procs(processes, 30)[1] == []
    assert "go" in [record["result"] for record in farm.records()]


@pytest.mark.parametrize("what", [("--command", "exit {}"), ("--function", "suspended:count")], ids=["command", "function"])
@pytest.mark.parametrize("whom", ["master", "worker"])
def test_an_exit_status_counts_though_the_parent_ignores_the_end_of_children(farm: Farm, whom: str, what: Any) -> None:
    ignore = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    local = ("--workers", 1, *what) if whom == "master" else ()
    master = run_after(farm, ignore, "task_master.py", "--port", 0, "--results", "results.jsonl", *local, "0", "3")
    if whom == "worker":
        run_after(farm, ignore, "task_worker.py", "--port", master.port(), "--processes", 1, *what)
    assert master.wait() == (1 if "--command" in what else 0)
    failed, counted = [record.get("error") for record in farm.records()], [record.get("result") for record in farm.records()]
    assert [bool(error) for error in failed] == [False, "--command" in what]
    assert "--command" in what or counted == [0, 3]


# ---- blocked output --------------------------------------------------------------------------------------------------


def signal_twice(program: Program, pipe: Pipe) -> None:
    """It ends, at the latest with the second signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        program.signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(0.5)
    assert program.wait() in (0, 130, 143)
    pipe.read()


def test_the_second_signal_ends_a_master_whose_standard_output_is_blocked(farm: Farm) -> None:
    pipe = Pipe()
    farm.write_tasks(list(range(1000)))
    redirect = f"os.dup2({pipe.writer}, 1)"
    master = run_after(farm, redirect, "task_master.py", "--port", 0, "--tasks", "tasks.jsonl", pass_fds=[pipe.writer])
    master.port()
    pipe.wait_full()
    signal_twice(master, pipe)


def test_the_second_signal_ends_a_master_whose_standard_error_is_blocked(farm: Farm) -> None:
    pipe = Pipe()
    redirect = f"os.dup2({pipe.writer}, 2)"
    master = run_after(farm, redirect, "task_master.py", "--port", 0, '"go"', pass_fds=[pipe.writer])
    port = int(pipe.read_until(b"\n").split(b":")[-1])
    pipe.fill()
    farm.run("task_worker.py", "--port", port, "--function", "suspended:work").wait_line("connected")
    signal_twice(master, pipe)


@pytest.mark.parametrize("descriptor", [1, 2])
def test_the_second_signal_ends_a_worker_whose_output_is_blocked(farm: Farm, descriptor: int) -> None:
    pipe = Pipe()
    master = farm.master('"go"')
    options = ("--port", master.port(), "--processes", 1, "--function", "suspended:work")
    worker = run_after(farm, f"os.dup2({pipe.writer}, {descriptor})", "task_worker.py", *options, pass_fds=[pipe.writer])
    if descriptor == 1:
        pipe.read_until(b"\n")
    pipe.fill()
    master.wait_line("connected")
    (farm.folder / "go").touch()
    signal_twice(worker, pipe)


# ---- what stood still goes on ----------------------------------------------------------------------------------------


def test_a_worker_comes_and_goes_while_nobody_reads_the_records(standstill: Standstill) -> None:
    worker = standstill.unread_farm.worker(standstill.unread, "--function", "suspended:work")
    worker.wait_line("connected to")
    worker.signal(signal.SIGTERM)
    worker.wait_line("draining")
    worker.signal(signal.SIGTERM)  # since it may wait until somebody reads what it has reported
    assert worker.wait() in (0, 143)
    assert standstill.unread.process.poll() is None


def test_records_that_nobody_read_for_a_while_come_once_each(standstill: Standstill) -> None:
    standstill.wait()
    records = [json.loads(line) for line in standstill.pipe.read().splitlines()]
    assert standstill.unread.wait() == 0
    assert sorted(record["id"] for record in records) == list(range(100))
    assert all(record["result"] == record["task"] and record["attempts"] in (1, 2) for record in records)


def test_a_master_that_was_stopped_goes_on_with_all_its_workers(standstill: Standstill) -> None:
    standstill.wait()
    assert [worker.process.poll() for worker in standstill.workers] == [None] * 3, "they have waited"
    standstill.master.signal(signal.SIGCONT)
    (standstill.farm.folder / "go").touch()
    standstill.wait_records(4)
    put(standstill.master, "".join(f"{n}\n" for n in range(20)))
    close_input(standstill.master)
    assert [program.wait() for program in [standstill.master, *standstill.workers]] == [0] * 4
    records = standstill.farm.records()
    assert sorted(record["id"] for record in records) == list(range(24))
    assert all(record["result"] == ("x" * LARGE if record["task"] == "stopped" else record["task"]) for record in records)
    assert not any("Traceback" in line for line in standstill.master.stderr)

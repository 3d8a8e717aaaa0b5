"""The first signal drains, the second leaves at once, for master and worker; and both say so."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from conftest import ROOT, Farm, Program, children_of

FUNCTIONS = """
import os, time

def note(n):
    descriptor = os.open("started.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{n}\\n".encode())
    os.close(descriptor)

def wait(n):
    \"\"\"Task 3 takes as long as there is no file `go`.\"\"\"
    note(n)
    time.sleep(0.02)
    while n == 3 and not os.path.exists("go"):
        time.sleep(0.01)
    return 2 * n
"""
TASKS = 50  # a second of work: a drain has begun long before they are through
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def farm(farm: Farm) -> Iterator[Farm]:
    (farm.folder / "signals.py").write_text(FUNCTIONS)
    yield farm
    for program in farm.programs:
        if program.process.stdin:
            program.process.stdin.close()


def wait_running(farm: Farm, program: Program, n: int = 3) -> None:
    """Block until task n runs."""
    path = farm.folder / "started.log"
    for _ in range(3000):
        if path.exists() and str(n) in path.read_text().split():
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(0.02)
            break
    pytest.fail(f"task {n} does not run; got {program.lines}")


def started(farm: Farm) -> list[int]:
    return [int(word) for word in (farm.folder / "started.log").read_text().split()]


def let_go(farm: Farm) -> None:
    (farm.folder / "go").touch()


def start_job(farm: Farm, *options: object, tasks: int = TASKS) -> tuple[Program, Program]:
    """A master and a worker that stands in task 3 of a job."""
    farm.write_tasks(list(range(tasks)))
    master = farm.master("--tasks", "tasks.jsonl", *options)
    worker = farm.worker(master, "--function", "signals:wait")
    wait_running(farm, worker)
    return master, worker


def check_complete(farm: Farm, tasks: int = TASKS) -> None:
    records = farm.records()
    assert sorted(record["id"] for record in records) == list(range(tasks))
    assert all(record["result"] == 2 * record["id"] for record in records)


def check_ended(processes: list[psutil.Process]) -> None:
    assert processes
    assert psutil.wait_procs(processes, 10)[1] == []


def check_silence(*programs: Program) -> None:
    """No traceback on anybody's standard error."""
    for program in programs:
        assert not any("Traceback" in line for line in program.stderr), program.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_drains_the_master_and_the_printed_command_resumes(farm: Farm, number: int) -> None:
    master, worker = start_job(farm, "--results", "results.jsonl")
    master.signal(number)
    master.wait_line("^task_master: draining")
    let_go(farm)
    assert master.wait() == 128 + number
    assert worker.wait() == 0
    assert worker.stdout[-1] == "worker exit."
    check_silence(master, worker)
    assert 3 in [record["id"] for record in farm.records()], "what ran is recorded"
    ran = started(farm)
    assert sorted(record["id"] for record in farm.records()) == sorted(ran), "and nothing was begun since"
    assert len(ran) < TASKS

    command = master.wait_line("to carry on: (.*)$").group(1)
    resumed = Program(shlex.split(command), farm.folder, farm.env())
    farm.programs.append(resumed)
    farm.worker(resumed, "--processes", 2, "--function", "signals:wait")
    assert resumed.wait() == 0
    check_complete(farm)
    assert len(started(farm)) == TASKS, "no task was run twice"


def test_a_second_drain_prints_a_command_that_resumes_too(farm: Farm) -> None:
    master, worker = start_job(farm, "--results", "results.jsonl", "--retries", 0)
    master.signal(signal.SIGINT)
    master.wait_line("draining")
    let_go(farm)
    master.wait()
    command = shlex.split(master.wait_line("to carry on: (.*)$").group(1))
    again = Program(command, farm.folder, farm.env())
    farm.programs.append(again)
    again.port()
    again.signal(signal.SIGINT)
    assert again.wait() == 130
    assert shlex.split(again.wait_line("to carry on: (.*)$").group(1)) == command
    assert worker.wait() == 0


def test_the_printed_command_quotes_what_a_shell_would_split(farm: Farm) -> None:
    path = farm.write_tasks([1, 2], "my tasks.jsonl")
    master = farm.master("--tasks", path, "--results", "my $results.jsonl", stdin=subprocess.DEVNULL)
    master.port()
    master.signal(signal.SIGTERM)
    assert master.wait() == 143
    command = master.wait_line("to carry on: (.*)$").group(1)
    resumed = Program(["sh", "-c", f"exec {command} --workers 1"], farm.folder, farm.env())
    farm.programs.append(resumed)
    assert resumed.wait() == 0
    assert len(farm.records("my $results.jsonl")) == 2


def test_a_drained_master_without_a_results_file_says_that_it_cannot_resume(farm: Farm) -> None:
    master, worker = start_job(farm)
    master.signal(signal.SIGINT)
    master.wait_line("draining")
    let_go(farm)
    assert master.wait() == 130
    assert "--results" in master.wait_line("stopped").string
    assert worker.wait() == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_makes_the_master_leave_at_once(farm: Farm, number: int) -> None:
    master, worker = start_job(farm, "--results", "results.jsonl")
    master.signal(signal.SIGTERM)
    master.wait_line("draining")
    master.signal(number)
    master.wait_line("leaving at once")
    assert master.wait() == 128 + number
    assert 3 not in [record["id"] for record in farm.records()]
    let_go(farm)
    check_silence(master)
    resumed = farm.run("task_master.py", *master.process.args[2:], "--resume")
    farm.worker(resumed, "--processes", 2, "--function", "signals:wait")
    assert resumed.wait() == 0
    check_complete(farm)
    assert worker.process.poll() is None, "it waits for its master"


def test_a_master_that_leaves_at_once_takes_its_local_workers_along(farm: Farm) -> None:
    options = ("--results", "results.jsonl", "--workers", 1, "--function", "signals:wait")
    master = farm.master("3", *options)
    wait_running(farm, master)
    local = psutil.Process(master.pid).children(recursive=True)
    try:
        master.signal(signal.SIGTERM)
        master.wait_line("draining")
        master.signal(signal.SIGTERM)
        assert master.process.wait(10) == 143
        check_ended(local)
    finally:
        let_go(farm)


def test_two_signals_at_once_leave_without_a_traceback(farm: Farm) -> None:
    for whom in ("master", "worker"):
        master = farm.master("3", "--results", "-")
        worker = farm.worker(master, "--function", "signals:wait")
        wait_running(farm, worker)
        (farm.folder / "started.log").unlink()
        program = master if whom == "master" else worker
        program.signal(signal.SIGINT)
        program.signal(signal.SIGTERM)
        assert program.wait(10) in (130, 143), program.stderr
        check_silence(program)
        program.wait_line("leaving at once")


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="needs pipes whose size can be set")
@pytest.mark.parametrize("file", ["task_master.py", "task_worker.py"])
def test_a_second_signal_while_the_first_is_being_told_leaves_without_a_traceback(farm: Farm, file: str) -> None:
    """Standard error is a full pipe, so that the first signal's message waits while the second comes."""
    master = farm.master("3", "--results", "-")
    ours, theirs = os.pipe()
    size = fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    port = "0" if file == "task_master.py" else str(master.port())
    command = [sys.executable, str(ROOT / file), "--port", port]
    program = subprocess.Popen(command, cwd=farm.folder, env=farm.env(), stdout=subprocess.DEVNULL, stderr=theirs)
    try:
        said = os.read(ours, size)
        if file == "task_master.py":  # it listens; when it welcomes somebody, it is ready for signals, too
            farm.run("task_worker.py", "--port", said.decode().split(":")[-1], "--function", "signals:wait")
            while b"connected" not in said:
                said += os.read(ours, size)
        os.write(theirs, b"." * size)
        for number in (signal.SIGINT, signal.SIGTERM):
            program.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(0.3)
        os.close(theirs)
        with open(ours, "rb") as reader:
            said = reader.read()
        assert b"Traceback" not in said, said[size:].decode()
        assert program.wait(10) in (130, 143)
    finally:
        program.kill()
        program.wait()


def test_a_drained_master_with_local_workers_waits_for_what_they_run(farm: Farm) -> None:
    farm.write_tasks(list(range(TASKS)))
    options = ("--results", "results.jsonl", "--workers", 2, "--function", "signals:wait")
    master = farm.master("--tasks", "tasks.jsonl", *options)
    wait_running(farm, master)
    local = psutil.Process(master.pid).children(recursive=True)
    os.killpg(master.pid, signal.SIGINT)  # what a terminal does
    master.wait_line("draining")
    let_go(farm)
    assert master.wait() == 130
    assert 3 in [record["id"] for record in farm.records()]
    check_ended(local)
    check_silence(master)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_drains_the_worker_and_another_finishes_the_job(farm: Farm, number: int) -> None:
    farm.write_tasks(list(range(TASKS)))
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    first = farm.worker(master, "--function", "signals:wait")
    wait_running(farm, first)
    os.killpg(first.pid, number)  # its children must not mind
    first.wait_line("^task_worker: draining")
    second = farm.worker(master, "--function", "signals:wait")
    for n in range(TASKS):  # also those that the first one had leased: it releases what it has not started
        wait_running(farm, second, n)
    let_go(farm)
    assert first.wait() == 0
    assert first.stdout[-1] == "worker exit."
    assert (master.wait(), second.wait()) == (0, 0)
    check_complete(farm)
    assert sorted(started(farm)) == list(range(TASKS)), "each was run once"
    assert "0 redelivered" in master.wait_line("redelivered").string
    check_silence(first, second, master)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_makes_the_worker_leave_at_once(farm: Farm, number: int) -> None:
    master, worker = start_job(farm, "--results", "results.jsonl")
    children = [psutil.Process(pid) for pid in children_of(worker.pid)]
    worker.signal(number)
    worker.wait_line("draining")
    worker.signal(number)
    worker.wait_line("leaving at once")
    assert worker.wait() == 128 + number
    check_ended(children)
    assert re.search(r"\b3 \(attempt", master.wait_line("redelivered since").string), "it is READY again, at once"
    check_silence(worker, master)


@pytest.mark.parametrize("numbers", [SIGNALS, SIGNALS[::-1]])
def test_a_signal_ends_an_idle_worker_and_an_idle_master(farm: Farm, numbers: list[int]) -> None:
    master = farm.master("--tasks", "-", "--results", "results.jsonl", stdin=subprocess.PIPE)
    worker = farm.worker(master)
    master.wait_line("connected")
    worker.signal(numbers[0])
    assert worker.wait() == 0
    master.signal(numbers[1])
    assert master.wait() == 128 + numbers[1]
    check_silence(worker, master)


def test_a_signal_that_comes_with_the_listening_line_drains(farm: Farm) -> None:
    for number in SIGNALS * 2:
        master = farm.master("1")
        master.port()
        master.signal(number)
        assert master.wait() == 128 + number
        check_silence(master)
        master.wait_line("draining")


def start_alone(farm: Farm, **without: Any) -> Program:
    """A worker whose master is not there; `key=None`: nor is its key."""
    env = farm.env()
    if "key" in without:
        del env["TASK_AUTHKEY"]
    worker = farm.run("task_worker.py", "--port", 1, env=env)
    worker.wait_line("waiting for")
    return worker


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_worker_whose_function_is_still_being_loaded(farm: Farm, number: int) -> None:
    (farm.folder / "slow.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\ndef work(n): ...\n")
    worker = farm.worker(farm.master("1"), "--function", "slow:work")
    worker.wait_line("loading", "stdout")
    worker.signal(number)
    assert worker.wait() == 0
    assert worker.stdout[-1] == "worker exit."


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_worker_that_waits_for_its_master(farm: Farm, number: int) -> None:
    worker = start_alone(farm)
    worker.signal(number)
    assert worker.wait() == 0
    check_silence(worker)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_worker_that_waits_for_its_key(farm: Farm, number: int) -> None:
    worker = start_alone(farm, key=None)
    worker.signal(number)
    assert worker.wait() in (0, 128 + number, -number)  # nothing is lost yet
    check_silence(worker)

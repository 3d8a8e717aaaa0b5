"""The first signal drains, the second leaves at once, for master and worker; and both say so."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from typing import Any

import psutil
import pytest
from lab import ROOT, Farm, Program, check_ended, check_silence, free_port, ok, wait_until

MODULE = """
import time
from functions import note, stay

def wait(n):
    '''Task 3 takes as long as there is no file `go`.'''
    (stay if n == 3 else note)(n)
    time.sleep(0.02)
    return 2 * n
"""
TASKS = 50  # a second of work: a drain has begun long before they are through
RESULTS = ("--results", "results.jsonl")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def start_worker(farm: Farm, master: Program, *argv: object, **options: Any) -> Program:
    return farm.worker(master, "--function", "mod:wait", *argv, **options)


def start_job(farm: Farm, *options: object) -> tuple[Program, Program]:
    """A master and a worker that stands in task 3 of a job."""
    master = farm.master("--tasks", farm.write_tasks(range(TASKS)), *options)
    worker = start_worker(farm, master)
    farm.wait_started(worker, 3)
    return master, worker


def open_text(farm: Farm, text: str) -> Any:
    return farm.write("input.txt", text).open("rb")


def find_command(master: Program) -> str:
    """The command that it says carries on."""
    return master.wait_line("to carry on: (.*)$").group(1)


def finish(farm: Farm, master: Program) -> None:
    """Give a master a worker; the job comes to its end."""
    start_worker(farm, master, "--processes", 2)
    assert master.wait() == 0
    farm.check_doubled(TASKS)


def recorded(farm: Farm) -> list[int]:
    return sorted(record["id"] for record in farm.records())


@pytest.mark.parametrize("which", [0, 1], ids=["master", "worker"])
def test_a_terminal_that_is_closed_is_one_signal_though_shell_and_system_both_say_so(farm: Farm, which: int) -> None:
    ours, theirs = os.openpty()
    master = farm.master("--tasks", farm.write_tasks(range(TASKS)), *RESULTS, stdin=theirs)
    worker = start_worker(farm, master, stdin=theirs)
    farm.wait_started(worker, 3)
    os.close(ours)
    os.close(theirs)
    closed = (master, worker)[which]
    closed.drain(signal.SIGHUP)
    closed.signal(signal.SIGHUP)
    farm.let_go()
    assert (worker.wait(), closed.wait()) == (0, (129, 0)[which])
    assert 3 in recorded(farm)
    check_silence(master, worker)


def test_a_worker_does_its_work_on_a_terminal_that_stops_what_writes_from_the_background(farm: Farm) -> None:
    code = "import pty, sys; pty.spawn(['sh', '-c', 'stty tostop; exec \"$@\"', 'sh', sys.executable, *sys.argv[1:]])"
    master = farm.master(*RESULTS, "1")
    worker = farm.run("-c", code, ROOT / "task_worker.py", "--port", master.port(), "--processes", 1)
    assert (master.wait(), worker.wait()) == (0, 0)


@pytest.mark.parametrize("name", ["task_master.py", "task_worker.py"])
def test_a_signal_during_the_start_makes_no_traceback(farm: Farm, name: str) -> None:
    program = farm.run("-X", "importtime", ROOT / name, "--port", free_port())
    program.wait_line("argparse")
    program.signal(signal.SIGINT)
    assert program.wait() in (-signal.SIGINT, 130, 0)  # 0: a worker that had begun to look for its master
    check_silence(program)


@each_signal
def test_the_first_signal_drains_the_master_and_the_printed_command_resumes_each_time(farm: Farm, number: int) -> None:
    master, worker = start_job(farm, *RESULTS, "--retries", 0)
    master.drain(number)
    farm.let_go()
    assert (master.wait(), worker.wait()) == (128 + number, 0)
    assert worker.stdout[-1] == "worker exit."
    check_silence(master, worker)
    assert 3 in recorded(farm), "what ran is recorded"
    assert recorded(farm) == sorted(map(int, farm.started())), "and nothing was begun since"
    assert len(farm.started()) < TASKS
    command = find_command(master)
    again = farm.start(shlex.split(command))
    again.port()
    again.drain(number)
    assert again.wait() == 128 + number
    assert find_command(again) == command
    finish(farm, farm.start(shlex.split(command)))
    assert len(farm.started()) == TASKS, "no task was run twice"


@pytest.mark.parametrize("given", [["--tasks", "my tasks.jsonl"], ["--", "-5", "3"]], ids=["file", "arguments"])
def test_the_printed_command_quotes_what_a_shell_would_split_and_adds_no_task(farm: Farm, given: list[str]) -> None:
    farm.write_tasks([-5, 3], "my tasks.jsonl")
    master = farm.master("--results", "my $results.jsonl", *given)
    master.port()
    master.drain()
    master.wait()
    again = farm.start(["sh", "-c", f"exec {find_command(master)}"])
    farm.worker(again)
    assert again.wait() == 0
    assert [record["task"] for record in farm.in_order("my $results.jsonl")] == [-5, 3]


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_task_that_is_cut_since_a_signal_has_ended_its_writer_too_is_not_run(farm: Farm, resumed: bool) -> None:
    """As Ctrl-C does in `find | task_master.py`; what was not read yet is no sign of another input."""
    argv = ("--tasks", "-", "--text", *RESULTS, "--workers", 1, "--function", "functions:same")
    if resumed:
        farm.run_job(*argv[:3], function="functions:same", stdin=farm.closing(open_text(farm, "one\ntwo\nthree\n")))
    master = farm.master(*argv, "--resume", stdin=subprocess.PIPE)
    master.put("one\n")
    if not resumed:
        farm.wait_records(master, 1)
    master.wait_line("connected")
    master.put("two\nthr" if not resumed else "tw")
    master.signal(signal.SIGINT)
    master.end_input()
    assert master.wait() == 130, master.stderr
    assert master.said("draining") and master.said(r"to carry on: .* --tasks - .* \(with the same input\)$")
    assert {record["task"] for record in farm.records()} <= {"one", "two", "three"}
    farm.run_job(*argv[:3], "--resume", function="functions:same", stdin=farm.closing(open_text(farm, "one\ntwo\nthree\n")))
    assert [record["task"] for record in farm.in_order()] == ["one", "two", "three"]


def test_a_signal_is_answered_though_the_job_has_come_to_its_last_failure(farm: Farm) -> None:
    master = farm.master("--max-failures", 1, *RESULTS, 3, "null")
    start_worker(farm, master, "--processes", 2)
    farm.wait_started(master, 3)
    master.wait_line("task 1 failed")
    master.drain()
    farm.let_go()
    assert master.wait() == 1


@pytest.mark.parametrize("argv", [RESULTS, ["1"], ["--results", os.devnull, "1"]], ids=" ".join)
def test_a_job_without_a_file_of_tasks_or_of_results_says_that_it_cannot_be_resumed(farm: Farm, argv: list[str]) -> None:
    for number in SIGNALS:  # each with the listening line, though nobody is connected
        master = farm.master(*argv)
        master.port()
        master.drain(number)
        assert "not remembered: use --tasks FILE" in master.wait_line("stopped").string
        assert master.wait() == 128 + number
        check_silence(master)


@each_signal
def test_the_second_signal_makes_the_master_leave_at_once(farm: Farm, number: int) -> None:
    master, worker = start_job(farm, *RESULTS)
    master.drain()
    master.signal(number)
    master.wait_line("leaving at once")
    assert master.wait() == 128 + number
    assert 3 not in recorded(farm)
    assert worker.is_running(), "it waits for its master"
    check_silence(master)
    farm.let_go()
    finish(farm, farm.run("task_master.py", *master.process.args[2:], "--resume"))


def test_a_signal_that_comes_when_the_job_is_over_does_not_say_that_it_was_stopped(farm: Farm) -> None:
    master = farm.master("3", *RESULTS)
    peer = farm.peer(master).join()  # which stays, so that the master waits a while for it to leave
    (task_id,) = peer.lease_ids()
    peer.report(ok(task_id, 9))
    master.signal(signal.SIGTERM)
    assert master.wait() == 0, master.stderr
    assert not master.said("stopped|draining")
    assert [record["result"] for record in farm.records()] == [9]


def test_a_drained_master_with_local_workers_waits_for_what_they_run(farm: Farm) -> None:
    tasks = farm.write_tasks(range(TASKS))
    master = farm.master("--tasks", tasks, *RESULTS, "--workers", 2, "--function", "mod:wait")
    farm.wait_started(master, 3)
    local = master.descendants()
    os.killpg(master.pid, signal.SIGINT)  # what a terminal does
    master.wait_line("draining")
    farm.let_go()
    assert master.wait() == 130
    assert 3 in recorded(farm)
    check_ended(local)
    check_silence(master)


@each_signal
def test_the_first_signal_drains_the_worker_and_another_finishes_the_job(farm: Farm, number: int) -> None:
    master, first = start_job(farm, *RESULTS)
    os.killpg(first.pid, number)  # its children must not mind
    first.wait_line("^task_worker: draining")
    second = start_worker(farm, master)
    # also those that the first one had leased: it releases what it has not started
    wait_until(lambda: len(set(farm.started())) == TASKS, second)
    farm.let_go()
    assert [program.wait() for program in (first, second, master)] == [0, 0, 0]
    assert first.stdout[-1] == "worker exit."
    farm.check_doubled(TASKS)
    assert len(farm.started()) == TASKS, "each was run once"
    assert master.said("0 redelivered")
    check_silence(first, second, master)


@each_signal
def test_the_second_signal_makes_the_worker_leave_at_once(farm: Farm, number: int) -> None:
    master, worker = start_job(farm, *RESULTS)
    children = worker.children()
    worker.drain(number)
    worker.signal(number)
    worker.wait_line("leaving at once")
    assert worker.wait() == 128 + number
    check_ended(children)
    assert len(worker.said("leaving at once")) == 1
    assert re.search(r"\b3 \(attempt", master.wait_line("redelivered since").string), "it is READY again, at once"
    check_silence(worker, master)


def test_a_signal_ends_a_worker_whose_function_is_still_being_loaded(farm: Farm) -> None:
    farm.write("slow.py", "import time\nprint('loading', flush=True)\ntime.sleep(600)\ndef work(n): ...\n")
    worker = farm.worker(farm.master("1"), "--function", "slow:work")
    worker.wait_line("loading", "stdout")
    worker.signal(signal.SIGHUP)
    assert worker.wait() == 0
    assert worker.stdout[-1] == "worker exit."


def test_a_signal_ends_a_worker_that_waits_for_a_key(farm: Farm) -> None:
    worker = farm.worker(1, env=farm.env(TASK_AUTHKEY=None))
    worker.wait_line("waiting for")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    check_silence(worker)


def test_a_signal_ends_an_idle_worker_and_an_idle_master(farm: Farm) -> None:
    master = farm.master("--tasks", "-", *RESULTS, stdin=subprocess.PIPE)
    worker = farm.worker(master)
    master.wait_line("connected")
    worker.drain(signal.SIGINT)
    master.put("1\n")  # which no worker that drains begins
    assert worker.wait() == 0
    master.signal(signal.SIGINT)
    assert master.wait() == 130
    assert farm.records() == []
    check_silence(worker, master)


@pytest.mark.parametrize("whom", ["master", "worker"])
def test_two_signals_at_once_leave_without_a_traceback(farm: Farm, whom: str) -> None:
    master, worker = start_job(farm, *RESULTS)
    program = master if whom == "master" else worker
    for number in (signal.SIGINT, signal.SIGTERM):
        program.signal(number)
    assert program.wait() in (130, 143), program.stderr
    check_silence(program)
    program.wait_line("leaving at once")


TWICE = """
import signal, task_worker

task_worker.catch_signals(lambda number, frame: print(number, flush=True))
for task_worker.SAME_SIGNAL in (100.0, 0.0):
    task_worker.CAUGHT.clear()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
"""


def test_a_signal_that_comes_twice_at_once_as_timeout_sends_it_counts_once(farm: Farm) -> None:
    program = farm.run("-c", TWICE, env=farm.env(PYTHONPATH=str(ROOT)))
    assert program.wait() == 0
    assert program.stdout == [str(int(signal.SIGTERM))] * 3


STARTS = """
import sys, threading, time, types
import task_worker

def start_children():
    worker = types.SimpleNamespace(folder=None, quiet=False, statement={"function": None, "command": None})
    children = []
    while True:
        children.append(task_worker.Child(worker))

if __name__ == "__main__":
    threading.Thread(target=start_children, daemon=True).start()
    time.sleep(float(sys.argv[1]))
    task_worker.leave_at_once(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker is one process")
def test_a_stop_from_the_keyboard_is_none_where_no_shell_could_continue(farm: Farm) -> None:
    """The worker leads a session, as over `ssh -t`; and what has killed its inner process is said."""
    master = farm.master("--tasks", "-", *RESULTS, stdin=subprocess.PIPE)
    worker = start_worker(farm, master)
    master.wait_line("worker .* connected")
    worker.signal(signal.SIGTSTP)
    master.put("1\n")
    farm.wait_records(master, 1)
    psutil.Process(worker.pid).children()[0].kill()
    assert worker.wait() == 137
    assert worker.said("the worker was killed by signal 9")


def test_a_task_that_is_told_to_end_together_with_its_worker_has_not_failed(farm: Farm) -> None:
    """As by a service manager that signals all processes."""
    master = farm.master(*RESULTS, "1")
    first = farm.worker(master, "--function", "functions:stay")
    farm.wait_started(first)
    (child,) = first.children()
    first.drain()
    child.terminate()
    assert first.wait() == 0
    farm.let_go()
    farm.worker(master, "--function", "functions:stay")
    assert master.wait() == 0
    assert [record["attempts"] for record in farm.records()] == [2]


def test_to_leave_while_a_process_starts_gives_no_traceback(farm: Farm) -> None:
    script = farm.write("starts.py", STARTS)
    for n in range(12):
        program = farm.run(script, 0.3 + n / 50, env=farm.env(PYTHONPATH=str(ROOT)))
        assert program.wait() == 7
        check_silence(program)

"""What a person sees while a job runs and at its end: on a terminal, elsewhere, and with --quiet."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from typing import Any

import psutil
import pytest
from lab import PATIENCE, ROOT, Farm, Program, wait_until

from task_master import find_kind, show_rate
from task_worker import PROTOCOL

MODULE = """
import time
from functions import note

def steps(n):
    '''A step of a job of a second; every fifth one fails.'''
    time.sleep(0.09)
    if n % 5 == 4:
        raise ValueError(f"{n} is an unlucky number")
    return n

def fail(task):
    kind, number = task
    raise [ValueError, OSError, TypeError][kind % 3](f"no {'abcdefghijklmnop'[kind]} in '{number}' or {number}")

def moody(n):
    '''The first task fails always, the second the first time.'''
    note(n)
    with open("started.log") as file:
        if n == 0 or (n == 1 and file.read().split().count("1") == 1):
            raise ValueError("no luck")
    time.sleep(1)
    return n
"""
# Makes standard input the terminal that Ctrl-C is pressed on, and goes on as another program
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
BAR = r"\[#*-*\] +\d+ %  "
FILE = ["--results", "results.jsonl"]


def overwrite(line: str) -> str:
    """What stands in a row of the screen after its texts, each of which ends with a carriage return, but for the last."""
    shown = ""
    for text in line.split("\r"):
        shown = text + shown[len(text) :]
    return shown.rstrip()


class Terminal:
    """A master whose terminal is a real one of the system, of so many columns; stdout may be elsewhere."""

    def __init__(self, farm: Farm, columns: int, *argv: object, stdout: int | None = None) -> None:
        self._ours, theirs = pty.openpty()
        self.raw = ""
        self.resize(columns)
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, sys.executable, str(ROOT / "task_master.py"), "--port", "0", *map(str, argv)],
            cwd=farm.folder, env=farm.env(), stdin=theirs, stdout=theirs if stdout is None else stdout, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def resize(self, columns: int) -> None:
        self.columns = columns
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that nobody has the other end any more
            while data := os.read(self._ours, 1 << 16):
                self.raw += data.decode()

    def wait_text(self, pattern: str) -> None:
        """Block until a pattern was shown, as a whole or in between."""
        wait_until(lambda: re.search(pattern, self.raw))

    def press_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def wait(self) -> int:
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)
        os.close(self._ours)

    def progress(self) -> list[str]:
        """Every text that was drawn without a line end, to be drawn over."""
        pieces = re.split(r"\r\n|\r", self.raw)
        ends = re.findall(r"\r\n|\r", self.raw)
        return [text.rstrip() for text, end in zip(pieces, [*ends, ""]) if end != "\r\n" and text.strip(" ^C")]

    def lines(self) -> list[str]:
        """The lines, as they were written."""
        return [line.rpartition("\r")[2].rstrip() for line in self.raw.split("\r\n")]

    def rows(self) -> list[str]:
        """What stands on the screen, if no progress is wider than that."""
        assert "\x1b" not in self.raw, "a sequence that not every terminal has"
        return [overwrite(line) for line in self.raw.split("\r\n")]


@pytest.fixture
def open_terminal(farm: Farm) -> Any:
    return lambda columns, *argv, **options: farm.closing(Terminal(farm, columns, *argv, **options))


JOB_OPTIONS = ["--workers", 2, "--function", "mod:steps"]
STEPS = list(range(20))


@pytest.mark.parametrize(
    ("columns", "results", "stdout"),
    [(150, FILE, None), (45, [], None), (45, ["--results", "-"], subprocess.DEVNULL), (30, FILE, None)],
    ids=["wide", "lines between", "standard output elsewhere", "narrow"],
)
def test_one_line_redraws_and_leaves_no_trace(open_terminal: Any, columns: int, results: list[str], stdout: int | None) -> None:
    terminal = open_terminal(columns, *results, *JOB_OPTIONS, *STEPS, stdout=stdout)
    assert terminal.wait() == 1
    if columns == 150:  # then there is room for all that one wants to know
        done = r"\[#+-+\] +\d+ %  [1-9]\d* of 20, \d+ failed, [\d.]+/s, \d:\d\d, \d:\d\d left, 2 processes on 1 host"
        assert re.search(done, terminal.raw)
    shown = terminal.progress()
    assert len(set(shown)) >= 3, shown
    first = BAR + r"\d+ of 20" if columns > 40 else r"\d+ %  \d+ of 20"
    assert [text for text in shown if not re.match(first, text) and not text.startswith("waiting for the wor")] == []
    assert max(map(len, shown)) < columns
    assert terminal.rows() == terminal.lines()
    lines = terminal.lines()
    assert [line for line in lines if re.search(r"task \d+ failed", line)]
    assert not [line for line in lines if re.search(BAR, line)]
    bars = re.findall(r"\[(#*)(-*)\] +(\d+) %  (\d+) of 20", terminal.raw)
    assert all((len(full), len(full + empty), int(part)) == (int(done), 20, 5 * int(done)) for full, empty, part, done in bars)


HANGING = rf"\(task 0 on {re.escape(socket.gethostname())}\)"


def test_what_has_run_longest_is_named_even_on_a_terminal_that_becomes_narrower(farm: Farm, open_terminal: Any) -> None:
    terminal = open_terminal(150, *FILE, "--workers", 1, "--function", "functions:stay", 1)
    terminal.wait_text("1 process on 1 host, longest 0:0[1-9] " + HANGING)
    terminal.resize(70)
    wait_until(lambda: max(map(len, terminal.progress()[-3:])) < 70)
    terminal.wait_text(r"\r  0 %  0 of 1, longest 0:\d\d " + HANGING)
    farm.let_go()
    assert terminal.wait() == 0


def test_when_nobody_is_connected_the_line_has_the_command_for_a_worker_of_this_job(farm: Farm, open_terminal: Any) -> None:
    """So that it can be copied, and is not refused."""
    what = ("--command", "until test -f go; do sleep 0.1; done; echo {}")
    terminal = open_terminal(200, *FILE, *what, 1, 2)
    shown = r"no worker: python3 task_worker.py --port (\d+) "
    terminal.wait_text(shown + re.escape(shlex.join(what)) + ", " + BAR + "0 of 2")
    port = re.search(shown, terminal.raw)[1]
    assert port == re.search(r"listening on \S+:(\d+)", terminal.raw)[1]
    farm.worker(int(port), *what)
    terminal.wait_text("0 of 2, [^n]*1 process on 1 host")
    farm.let_go()
    assert terminal.wait() == 0


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, rf"--host {re.escape(socket.gethostname())} --port \d+ --command 'echo {{}} echo done' --no-tls"),
        (90, r"--port \d+ --com.*\.\.\."),
    ],
)
def test_the_command_for_another_host_names_this_one_and_is_visibly_cut(open_terminal: Any, columns: int, shown: str) -> None:
    open_terminal(columns, *FILE, "--host", "0.0.0.0", "--no-tls", "--command", "echo {}\necho done", 1).wait_text(shown)


def test_a_total_that_is_not_known_is_not_shown(farm: Farm, open_terminal: Any) -> None:
    fifo = farm.folder / "tasks"
    os.mkfifo(fifo)
    terminal = open_terminal(80, "--tasks", fifo, *FILE, *JOB_OPTIONS)
    with open(fifo, "w") as file:
        file.write("1\n2\n3\n")
        file.flush()
        terminal.wait_text(r"\r3 done, ")
        assert not re.search(" of | left|%", "".join(terminal.progress()))
    assert terminal.wait() == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks into /proc")
def test_what_a_worker_could_not_kill_does_not_keep_the_master(farm: Farm, open_terminal: Any) -> None:
    """It may be another user's, and has the pipe through which the worker's output comes."""
    terminal = open_terminal(80, *FILE, "--workers", 1, "--function", "functions:stay", 1)
    terminal.wait_text("it runs")
    (worker,) = psutil.Process(terminal.process.pid).children()
    with open(f"/proc/{worker.pid}/fd/1", "wb"):
        farm.let_go()
        assert terminal.wait() == 0
    assert terminal.lines()[-2].startswith("task_master: 1 done, ")


def test_a_second_ctrl_c_leaves_whole_lines_too(open_terminal: Any) -> None:
    terminal = open_terminal(100, *FILE, "--workers", 1, "--function", "functions:stay", 1)
    terminal.wait_text(BAR)
    terminal.press_ctrl_c()
    terminal.wait_text("(?s)draining.* 0 done|draining.*\r0 done")
    terminal.press_ctrl_c()
    assert terminal.wait() == 130
    assert [line for line in terminal.rows() if line.startswith("task_master: leaving at once")], terminal.rows()


def test_ctrl_c_leaves_whole_lines(open_terminal: Any) -> None:
    terminal = open_terminal(100, *FILE, *JOB_OPTIONS, *STEPS)
    terminal.wait_text(BAR + "[1-9]")
    terminal.press_ctrl_c()
    assert terminal.wait() == 130
    lines = terminal.rows()
    assert not [line for line in lines if re.search(BAR, line)]
    drained = next(number for number, line in enumerate(lines) if "draining" in line)
    assert any(re.match("task_master: stopped; to carry on: .* --resume", line) for line in lines[drained:])


def test_quiet_shows_nothing_on_a_terminal(open_terminal: Any) -> None:
    terminal = open_terminal(80, "--quiet", *FILE, *JOB_OPTIONS, 1, 2, 3, 4)
    assert terminal.wait() == 1
    assert terminal.progress() == []
    assert [line for line in terminal.rows() if line and "listening" not in line] == []


def run_patched(farm: Farm, *argv: object, **options: Any) -> Program:
    """A master for which the time between two lines is short."""
    return farm.run(farm.make_patched(PROGRESS_INTERVAL=0.3) / "task_master.py", "--port", 0, *FILE, *argv, **options)


def test_without_a_terminal_there_is_a_plain_line_now_and_then(farm: Farm) -> None:
    master = run_patched(farm, *JOB_OPTIONS, *STEPS)
    assert master.wait() == 1, master.stderr
    lines = master.said(" of 20")
    assert len(lines) >= 2
    assert all(re.match(f"task_master: (waiting for the worker .*, )?{BAR}", line) for line in lines)
    assert not any("\r" in line or "\x1b" in line for line in master.stderr)
    begun = [" left" in line for line in lines if not re.search(" (0|20) of 20", line)]
    assert begun and all(begun), "the time left is known when a task is done"
    assert not [line for line in lines if re.search(" 0 of 20.* left", line)]


def test_the_rate_does_not_count_the_time_before_there_were_workers(farm: Farm) -> None:
    master = run_patched(farm, "--function", "mod:steps", *STEPS)
    master.pause(5)
    farm.worker(master, "--function", "mod:steps")
    found = master.wait_line(r"  (\d+) of 20.*, (\S+)/s, 0:(\d\d), .* left")
    assert float(found[2]) > 1.5 * int(found[1]) / int(found[3])


def test_a_queue_that_has_nothing_to_do_is_silent(farm: Farm) -> None:
    master = run_patched(farm, "--tasks", "-", "--workers", 1, stdin=subprocess.PIPE)
    master.put("1\n")
    master.wait_line("1 done, .* 1 process on 1 host")
    time.sleep(1.5)  # since there is no event for what must not happen
    assert len(master.said("1 done, .* 1 process on 1 host")) <= 2
    master.put("2\n")
    master.wait_line("2 done, ")


def test_quiet_leaves_the_lines_on_standard_output_and_says_nothing_else_but_where_the_master_listens(farm: Farm) -> None:
    patched, what = farm.make_patched(PROGRESS_INTERVAL=0.3) / "task_master.py", ("--quiet", "--function", "mod:steps")
    master = farm.run(patched, "--port", 0, *what, *STEPS[:8])
    worker = farm.worker(master, *what)
    assert (worker.wait(), master.wait()) == (0, 1)
    puts, results = [f"Put task {n}..." for n in range(8)], [f"Result: {n}" for n in range(8) if n % 5 != 4]
    assert master.stdout == [*puts, "Try get results...", *results]
    assert master.said("listening on") == master.stderr
    assert worker.stderr == []


LAST = r"task_master: (\d+) done, (\d+) failed, (\d+) retried, (\d+) redelivered, (\d+:\d\d), ([\d.]+) tasks/s$"


def last_line(master: Program) -> tuple[str, ...]:
    """What the last line says: done, failed, retried, redelivered, the time, and the rate."""
    match = re.match(LAST, master.stderr[-1])
    assert match, master.stderr
    return match.groups()


def test_the_summary_counts_what_happened_and_names_the_hosts(farm: Farm) -> None:
    master = farm.master(*FILE, "--retries", 1, "--function", "mod:moody", *range(4))
    lost = farm.peer(master, "far/7")
    assert lost.call("get_task_queue", "join", PROTOCOL, '{"function": "mod:moody"}')["refused"] is None
    assert lost.lease_ids() == [0]
    lost.close()
    master.wait_line(r"redelivered since far/7 was lost: task 0 \(attempt 1\)$")
    worker = farm.worker(master, "--function", "mod:moody", "--processes", 1)
    assert (master.wait(), worker.wait()) == (1, 0)
    assert last_line(master)[:4] == ("3", "1", "2", "1")
    assert 0.0 < float(last_line(master)[5]) < 4 / 3  # the three that were done took a second each
    assert "task_master: host far: 1 process, 0 runs, 0 failed, 0 % busy" in master.stderr
    (line,) = master.said(f"host {re.escape(socket.gethostname())}: ")
    busy = re.search(r": 1 process, 6 runs, 3 failed, (\d+) % busy$", line)
    assert busy and 20 <= int(busy[1]) <= 100, line  # of a noisy machine
    assert len(master.said("task 0 failed: ValueError: no luck .*, attempt 3$")) == 1
    assert len(master.said("task 0 is retried: ValueError: no luck .*, attempt 2$")) == 1


def test_the_first_failure_of_each_kind_is_said_and_the_summary_counts_ten_kinds(farm: Farm) -> None:
    tasks = farm.write_tasks([[kind, number] for kind in range(13) for number in range(kind + 1)])
    master = farm.run_job("--tasks", tasks, function="mod:fail", status=1)
    firsts, names = [sum(range(kind + 1)) for kind in range(13)], ["ValueError", "OSError", "TypeError"] * 5
    said = r"task (\d+) failed: (\w+): .* \(task \1, on (\S+)/\d+: (\[.*\])\), attempt 1$"
    assert [re.search(said, line).groups() for line in master.said(r"task \d+ failed: ")] == [
        (str(firsts[kind]), names[kind], socket.gethostname(), f"[{kind}, 0]") for kind in range(13)
    ]
    table = [re.match(r"task_master: ( *\d+) x (\w+): (.*) \(task (\d+), on ", line) for line in master.said(r"\d x ")]
    assert [match.groups() for match in table if match] == [
        (f"{kind + 1:7}", names[kind], f"no {'abcdefghijklmnop'[kind]} in '0' or 0", str(firsts[kind]))
        for kind in range(12, 2, -1)
    ]
    assert "task_master: 91 failed:" in master.stderr
    assert master.said("and 6 of other kinds, see the records with an error$")
    assert last_line(master)[:2] == ("0", "91")


def test_errors_that_differ_in_the_name_of_a_file_are_of_one_kind() -> None:
    names = ["a.md", "b/c", "/d/e", "../f.tar.gz", "7.5"]
    assert len({find_kind(f"CommandFailed: exit status 1: wc: {name}: No such file", {}) for name in names}) == 1
    assert len({find_kind(f"OSError: {text}", {}) for text in ("a.md is odd", "a.md is even", "a.md. No", "i/o")}) == 4


def test_of_the_retries_of_a_kind_the_first_are_said_and_all_are_counted(farm: Farm) -> None:
    tasks = farm.write_tasks([[kind, number] for kind in (0, 1) for number in range(30)])
    master = farm.run_job("--tasks", tasks, "--retries", 1, function="mod:fail", status=1)
    assert len(master.said("is retried: ValueError.*, attempt 1$")) == len(master.said("is retried: OSError")) == 10
    assert last_line(master)[:3] == ("0", "60", "60")


def test_no_rate_of_a_slow_job_is_shown_as_zero() -> None:
    assert [show_rate(rate) for rate in (1500.4, 15.4, 1.54, 0.0154)] == ["1500", "15", "1.5", "0.015"]

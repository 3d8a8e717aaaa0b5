"""What a person sees while a job runs and at its end: on a terminal, elsewhere, and with --quiet."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, Farm, Program

pty = pytest.importorskip("pty", reason="terminals are of POSIX")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

JOB = """
import os, time

def steps(n):
    '''A step of a job of a second; every fifth one fails.'''
    time.sleep(0.09)
    if n % 5 == 4:
        raise ValueError(f"{n} is an unlucky number")
    return n

def wait(n):
    print("waits", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.01)
    return n

def moody(kind):
    '''Fails always or the first time, waits the first time for its worker to be killed, or waits for another one.'''
    first = not os.path.exists(f"seen-{kind}")
    open(f"seen-{kind}", "w").close()
    if kind == "fails" or (kind == "fails first" and first):
        raise ValueError("no luck")
    if kind == "waits" and first:
        print("waits", flush=True)
        time.sleep(300)
    while kind in ("left", "right") and not (os.path.exists("seen-left") and os.path.exists("seen-right")):
        time.sleep(0.01)
    return kind
"""
PATCHED = """
import sys, task_master
task_master.PROGRESS_INTERVAL = 0.3  # in the place of 30
task_master.RATE_SPAN = 0.2  # in the place of 10
task_master.console.__init__()
sys.exit(task_master.main())
"""
# Makes standard input the terminal that Ctrl-C is pressed on, and goes on as another program
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Screen:
    """As much of a terminal as a line of progress needs: rows that wrap, carriage returns, and erasing to the end."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows = [""]
        self.wrapped = [False]  # whether a row goes on with the one above
        self._column = 0

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", text, re.DOTALL):
            if part == "\r":
                self._column = 0
            elif part == "\n":
                self._next_row(wrapped=False)
            elif part in ("\x1b[K", "\x1b[0K"):
                self.rows[-1] = self.rows[-1][: self._column]
            elif part == "\x1b[2K":
                self.rows[-1] = ""
            else:
                assert len(part) == 1, f"a sequence that no test knows: {part!r}"
                self._put(part)

    def _put(self, letter: str) -> None:
        if self._column == self.columns:
            self._next_row(wrapped=True)
            self._column = 0
        row = self.rows[-1].ljust(self._column)
        self.rows[-1] = row[: self._column] + letter + row[self._column + 1 :]
        self._column += 1

    def _next_row(self, wrapped: bool) -> None:
        self.rows.append("")
        self.wrapped.append(wrapped)

    def lines(self) -> list[str]:
        """What stands on the screen, with wrapped rows put together, without the blanks at the ends."""
        lines: list[str] = []
        for row, wrapped in zip(self.rows, self.wrapped):
            if wrapped:
                lines[-1] = lines[-1].ljust(self.columns) + row
            else:
                lines.append(row)
        return [line.rstrip() for line in lines]


class Terminal:
    """A master whose terminal is a real one of the system, of so many columns; stdout may be elsewhere."""

    def __init__(self, farm: Farm, columns: int, *argv: object, stdout: int | None = None) -> None:
        self._ours, theirs = pty.openpty()
        self.raw = ""
        self._changed = threading.Condition()
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
                with self._changed:
                    self.raw += data.decode()
                    self._changed.notify_all()

    def wait_text(self, pattern: str, count: int = 1) -> None:
        """Block until a pattern was shown so often, as a whole or in between."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(re.findall(pattern, self.raw)) >= count, PATIENCE):
                pytest.fail(f"not {count} times {pattern!r} in {self.raw!r}")

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

    def screen(self) -> Screen:
        screen = Screen(self.columns)
        screen.feed(self.raw)
        return screen

    def check_lines(self) -> None:
        """Every line stands on the screen as it was written, and nothing else does."""
        written = [line.rpartition("\r")[2].rstrip() for line in self.raw.split("\r\n")]
        assert self.screen().lines() == written


@pytest.fixture
def open_terminal(farm: Farm) -> Iterator[Any]:
    (farm.folder / "job.py").write_text(JOB)
    opened: list[Terminal] = []

    def open_it(columns: int, *argv: object, **options: Any) -> Terminal:
        opened.append(Terminal(farm, columns, *argv, **options))
        return opened[-1]

    yield open_it
    for terminal in opened:
        terminal.close()


JOB_OPTIONS = ["--workers", 2, "--function", "job:steps"]
STEPS = list(range(20))


# ---- on a terminal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "results"), [(80, ["--results", "results.jsonl"]), (40, [])], ids=["80", "40"])
def test_one_line_redraws_and_leaves_no_trace(farm: Farm, open_terminal: Any, columns: int, results: list[str]) -> None:
    terminal = open_terminal(columns, *results, *JOB_OPTIONS, *STEPS)
    assert terminal.wait() == 1
    shown = terminal.progress()
    assert len(set(shown)) >= 3, shown
    assert all(re.match(r"\d+ of 20 done", text) for text in shown), shown
    assert max(map(len, shown)) < columns
    terminal.check_lines()
    lines = terminal.screen().lines()
    assert len([line for line in lines if re.search(r"task \d+ failed", line)]) >= 4
    assert not [line for line in lines if " of 20 done" in line]


def test_the_line_tells_what_one_wants_to_know(farm: Farm, open_terminal: Any) -> None:
    terminal = open_terminal(80, "--results", "results.jsonl", *JOB_OPTIONS, *STEPS)
    terminal.wait_text(r"\r[1-9]\d* of 20 done, [\d.]+ s left, \d+ failed, [\d.]+/s, 2 running, 1 workers?")


def test_a_narrow_terminal_shows_the_most_important_part(farm: Farm, open_terminal: Any) -> None:
    terminal = open_terminal(12, "--results", "results.jsonl", *JOB_OPTIONS, *STEPS)
    terminal.wait()
    shown = terminal.progress()
    assert shown
    assert max(map(len, shown)) < 12
    assert all(re.match(r"\d+ of 20", text) for text in shown), shown
    terminal.check_lines()


def test_the_width_is_that_of_the_terminal_when_standard_output_is_elsewhere(farm: Farm, open_terminal: Any) -> None:
    terminal = open_terminal(40, "--results", "-", *JOB_OPTIONS, *STEPS, stdout=subprocess.DEVNULL)
    terminal.wait()
    assert max(map(len, terminal.progress())) < 40
    terminal.check_lines()


def test_the_line_follows_a_terminal_that_becomes_narrower(farm: Farm, open_terminal: Any) -> None:
    terminal = open_terminal(90, "--results", "results.jsonl", "--workers", 1, "--function", "job:wait", 1)
    terminal.wait_text(r"1 running, 1 workers?")
    terminal.resize(30)
    before = len(terminal.progress())
    terminal.wait_text(r"\r0 of 1 done", count=before + 3)
    (farm.folder / "go").touch()
    assert terminal.wait() == 0
    assert max(map(len, terminal.progress()[before + 1 :])) < 30


def test_a_total_that_is_not_known_is_not_shown(farm: Farm, open_terminal: Any) -> None:
    fifo = farm.folder / "tasks"
    os.mkfifo(fifo)
    terminal = open_terminal(80, "--tasks", fifo, "--results", "results.jsonl", *JOB_OPTIONS)
    with open(fifo, "w") as file:
        file.write("1\n2\n3\n")
        file.flush()
        terminal.wait_text(r"\r3 done, ")
        assert " of " not in "".join(terminal.progress())
        assert " left" not in "".join(terminal.progress())
    assert terminal.wait() == 0


def test_ctrl_c_leaves_whole_lines(farm: Farm, open_terminal: Any) -> None:
    terminal = open_terminal(80, "--results", "results.jsonl", *JOB_OPTIONS, *STEPS)
    terminal.wait_text(r"\r[1-9]\d* of 20 done")
    terminal.press_ctrl_c()
    assert terminal.wait() == 130
    lines = terminal.screen().lines()
    assert not [line for line in lines if " of 20 done" in line]
    drained = next(number for number, line in enumerate(lines) if "draining" in line)
    assert any(re.match("task_master: stopped; to carry on: .* --resume", line) for line in lines[drained:])


def test_quiet_shows_nothing_on_a_terminal(farm: Farm, open_terminal: Any) -> None:
    terminal = open_terminal(80, "--quiet", "--results", "results.jsonl", *JOB_OPTIONS, 1, 2, 3, 4)
    assert terminal.wait() == 1
    assert terminal.progress() == []
    assert [line for line in terminal.screen().lines() if line and "listening" not in line] == []


# ---- elsewhere -----------------------------------------------------------------------------------------------------


def run_patched(farm: Farm, *argv: object) -> Program:
    """A master for which time goes faster."""
    (farm.folder / "job.py").write_text(JOB)
    return farm.run("-c", PATCHED, "--port", 0, *argv, env=farm.env(PYTHONPATH=str(ROOT)))


def test_without_a_terminal_there_is_a_plain_line_now_and_then(farm: Farm) -> None:
    master = run_patched(farm, "--results", "results.jsonl", *JOB_OPTIONS, *STEPS)
    assert master.wait() == 1, master.stderr
    lines = [line for line in master.stderr if " of 20 done" in line]
    assert len(lines) >= 2
    assert all(re.match(r"task_master: \d+ of 20 done, ", line) for line in lines)
    assert not any("\r" in line or "\x1b" in line for line in master.stderr)


def test_the_time_left_is_known_while_tasks_take_longer_than_the_rate_is_taken_over(farm: Farm) -> None:
    master = run_patched(farm, "--results", "results.jsonl", "--workers", 1, "--function", "functions:nap", *["0.8"] * 2)
    assert master.wait() == 0, master.stderr
    lines = [line for line in master.stderr if re.search(r"1 of 2 done", line)]
    assert lines
    assert all(" left" in line for line in lines), lines


def test_without_a_terminal_the_first_line_comes_after_the_interval(farm: Farm) -> None:
    master = farm.master("--workers", 1, "3")
    assert master.wait() == 0
    assert not any(re.search(r"\d of \d+ done", line) for line in master.stderr)


def test_quiet_says_nothing_but_where_it_listens(farm: Farm) -> None:
    master = run_patched(farm, "--quiet", "--results", "results.jsonl", *JOB_OPTIONS, *STEPS)
    assert master.wait() == 1
    assert [line for line in master.stderr if "listening on" not in line] == []


def test_quiet_leaves_the_lines_on_standard_output(farm: Farm) -> None:
    master = farm.master("--quiet", "3")
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)
    assert master.stdout == ["Put task 3...", "Try get results...", "Result: 3 * 3 = 9"]


def test_a_quiet_worker_says_nothing_on_standard_error(farm: Farm) -> None:
    master = farm.master("3")
    worker = farm.worker(master, "--quiet")
    assert (worker.wait(), master.wait()) == (0, 0)
    assert worker.stderr == []


# ---- the summary ---------------------------------------------------------------------------------------------------


def find_summary(master: Program) -> list[str]:
    """The lines after the last one about a worker that came or went."""
    last = max(number for number, line in enumerate(master.stderr) if re.search("connected$|exit", line))
    return master.stderr[last + 1 :]


def test_the_summary_counts_what_happened_and_names_the_workers(farm: Farm) -> None:
    (farm.folder / "job.py").write_text(JOB)
    kinds = ["waits", "fails first", "fails", "left", "right"]
    farm.write_tasks(kinds)
    options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--retries", 1, "--batch", 1]
    started_at = time.monotonic()
    master = farm.master(*options)
    victim = farm.worker(master, "--function", "job:moody")
    victim.wait_line("waits", "stdout")
    victim.kill()
    master.wait_line("redelivered since")
    other = farm.worker(master, "--function", "job:moody", "--processes", 2)
    assert (master.wait(), other.wait()) == (1, 0)
    elapsed = time.monotonic() - started_at
    summary = "\n".join(find_summary(master))
    counts = re.search(r"4 done, 1 failed, 2 retried, 1 redelivered, ([\d.]+) s, ([\d.]+) tasks/s", summary)
    assert counts, master.stderr
    assert 0 < float(counts.group(1)) <= elapsed
    assert re.search(r"task 2 failed: ValueError: no luck", summary)
    workers = re.findall(r"worker (\S+)/(\d+): (\d) process(?:es)?, (\d+) tasks?, (\d+)% busy", summary)
    assert {int(worker[1]) for worker in workers} >= {other.pid}
    assert next(worker[2:4] for worker in workers if int(worker[1]) == other.pid) == ("2", "7")


def test_the_summary_names_the_first_few_failures_and_counts_the_others(farm: Farm) -> None:
    options = ["--results", "results.jsonl", "--workers", 2, "--function", "functions:fail"]
    master = farm.master(*options, *range(30))
    assert master.wait() == 1
    summary = find_summary(master)
    named = [line for line in summary if re.search(r"task \d+ failed: ValueError: no \d+ today", line)]
    assert 3 <= len(named) <= 10
    assert any(f"{30 - len(named)} more failed" in line for line in summary)
    assert any("0 done, 30 failed" in line for line in summary)


def test_a_slow_job_has_a_rate_above_zero(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", "--workers", 1, "--function", "functions:nap", "2.2")
    assert master.wait() == 0
    (rate,) = [float(match.group(1)) for line in master.stderr if (match := re.search(r"([\d.]+) tasks/s", line))]
    assert 0.0 < rate < 0.5

"""The farm from Python: `with TaskMaster(...) as master: for record in master.run(tasks)`, and what it leaves behind: nothing."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, ROOT, Farm

import task_master
from task_master import Failure, TaskMaster

KEY = b"a key of more than 16 bytes"
MINE = """
import time

def halve(n):
    if n % 2:
        raise ValueError(f"{n} is odd")
    return n // 2

def wait(seconds):
    time.sleep(seconds)
"""

SCRIPT = """
import multiprocessing
import sys

from task_master import TaskMaster


def main():
    limit = 20
    tasks = (n for n in range(limit))  # nothing here could be sent to another process
    with TaskMaster(port=0, workers=2, function="mine:halve", log=lambda line: None) as master:
        print(sum(record.result for record in master.run(tasks) if record.ok), multiprocessing.get_start_method())


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    main()
"""

UNGUARDED = """
from task_master import TaskMaster

with TaskMaster(port=0, workers=2) as master:
    print(sorted(record.result for record in master.run([3, 4])))
"""


class Leftovers:
    """What was there before, and what a farm started since."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._children = set(psutil.Process().children(recursive=True))
        self._started: set[psutil.Process] = set()
        self._ports: set[int] = set()

    def note(self, master: TaskMaster) -> None:
        """Remember the processes and the port of a master that runs."""
        self._started |= set(psutil.Process().children(recursive=True)) - self._children
        self._ports.add(master.address[1])

    def check(self) -> None:
        """Nothing is left, at once but for what is about to end."""
        for thread in set(threading.enumerate()) - self._threads:
            thread.join(10)
            assert not thread.is_alive(), f"{thread} is left behind"
        started = self._started | set(psutil.Process().children(recursive=True)) - self._children
        give_up_at = time.monotonic() + 10
        while alive := [process for process in started if is_alive(process)]:
            assert time.monotonic() < give_up_at, f"{alive} are left behind"
            time.sleep(0.01)
        for port in self._ports:
            with socket.socket() as client:
                assert client.connect_ex(("127.0.0.1", port)), f"port {port} is left open"


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that was killed and waits for the system to take notice does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leftovers]:
    """In the folder of mine.py, with an empty home; afterwards nothing may be left of any farm."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("TASK_", "PYTHON"))]:
        monkeypatch.delenv(name)
    leftovers = Leftovers()
    yield leftovers
    leftovers.check()


def start(workers: int = 1, function: str | None = "mine:halve", **options: Any) -> TaskMaster:
    options.setdefault("authkey", KEY)
    return TaskMaster(port=0, workers=workers, function=function, **options)


# ---- records -------------------------------------------------------------------------------------------------------


def test_records_say_what_became_of_each_task(mine: Leftovers) -> None:
    with start(workers=2) as master:
        mine.note(master)
        records = sorted(master.run([4, 7, 10]))
    assert [(record.id, record.task, record.ok, record.result, record.attempts) for record in records] == [
        (0, 4, True, 2, 1),
        (1, 7, False, None, 1),
        (2, 10, True, 5, 1),
    ]
    assert [record.error for record in records if record.ok] == [None, None]
    error = records[1].error
    assert error
    assert (error["type"], error["message"]) == ("ValueError", "7 is odd")
    assert "in halve" in error["traceback"]
    assert all(record.seconds is not None and 0 <= record.seconds < PATIENCE for record in records)
    assert all(record.worker.startswith(socket.gethostname() + "/") for record in records)


def test_without_a_function_numbers_are_squared(mine: Leftovers) -> None:
    with start(function=None) as master:
        assert [record.result for record in master.run([12])] == ["12 * 12 = 144"]


def test_any_json_value_is_a_task(mine: Leftovers) -> None:
    values = [None, True, 0, -1.5, "ü\n\ud800", [1, [2]], {"a": {"b": None}}, (1, 2)]
    with start(function="builtins:repr") as master:
        records = sorted(master.run(values))
    assert [record.task for record in records[:-1]] == values[:-1]
    assert [record.result for record in records] == [*map(repr, values[:-1]), "[1, 2]"]  # JSON has no tuples


def test_a_result_that_cannot_be_read_here_is_an_error_of_that_task(mine: Leftovers, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is nested too deeply for the stack that is left where the records are asked for."""

    def read(outcome: str) -> Any:
        raise RecursionError("too deep")

    with TaskMaster(port=0, authkey=KEY, workers=1, function="math:sqrt") as master:
        monkeypatch.setattr(task_master, "load_results", lambda tasks: None)
        monkeypatch.setattr(task_master, "read_outcome", read)
        (record,) = master.run([2])
    assert (record.id, record.task, record.ok, record.result, record.attempts) == (0, 2, False, None, 1)
    assert "too deep" in record.error["message"]


def test_run_may_be_called_again_and_counts_from_0(mine: Leftovers) -> None:
    with start() as master:
        mine.note(master)
        for values in ([2, 4], [6, 8, 10], []):
            records = sorted(master.run(values))
            assert [(record.id, record.task, record.result) for record in records] == [
                (number, value, value // 2) for number, value in enumerate(values)
            ]


def test_a_worker_from_elsewhere_may_do_the_work(farm: Farm, mine: Leftovers) -> None:
    said: list[str] = []
    with start(workers=0, function=None, authkey=farm.key.encode(), log=said.append) as master:
        options = ["--port", master.address[1], "--processes", 1, "--function", "functions:double"]
        worker = farm.run("task_worker.py", *options)
        records = list(master.run(["ab"]))
    assert worker.wait() == 0
    assert [(record.result, record.worker.split("/")[1]) for record in records] == [("abab", str(worker.pid))]
    assert [line for line in said if line == f"worker {records[0].worker} connected"]


def test_a_farm_may_be_run_by_any_thread(mine: Leftovers) -> None:
    results: list[Any] = []

    def work() -> None:
        with start() as master:
            results.extend(record.result for record in master.run([2, 4]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE)
    assert sorted(results) == [1, 2]


# ---- tasks that are read lazily ------------------------------------------------------------------------------------


def test_the_next_task_is_asked_for_before_there_is_one_and_runs_when_it_comes(mine: Leftovers) -> None:
    tasks: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    with start() as master:
        for _again in range(2):
            tasks.put(2)
            seen = []
            for record in master.run(iter(tasks.get, None)):
                seen.append(record.result)
                tasks.put(2 * len(seen) + 2 if len(seen) < 4 else None)
            assert seen == [1, 2, 3, 4]


def test_no_more_tasks_are_read_than_there_is_room_for(mine: Leftovers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_master, "READY_LIMIT", 50)
    monkeypatch.setattr(task_master, "WINDOW", 100)
    too_many = threading.Event()

    def count() -> Iterator[int]:
        for number in itertools.count():
            if number > 100 + 50 + 2000:  # waiting for the caller, READY, and leased by then
                too_many.set()
            yield 2 * number

    with start() as master:
        for _record in master.run(count()):
            assert not too_many.wait(0.5)
            break


@pytest.mark.timeout(20)
def test_an_endless_iterable_ends_with_the_interest_in_it(mine: Leftovers) -> None:
    closed = threading.Event()

    def count() -> Iterator[int]:
        try:
            yield from itertools.count(0, 2)
        finally:
            closed.set()

    with start() as master:
        mine.note(master)
        results = sorted(record.result for record in itertools.islice(master.run(count()), 10))
        assert len(set(results)) == 10
    assert closed.wait(10)


# ---- tasks that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error"), [({1, 2}, TypeError), (float("nan"), ValueError), (b"bytes", TypeError), (object(), TypeError)]
)
def test_a_task_that_is_not_json_is_raised_after_the_records_of_those_before_it(
    mine: Leftovers, bad: object, error: type[Exception]
) -> None:
    seen = []
    with start() as master:
        mine.note(master)
        with pytest.raises(error):
            for record in master.run([2, 4, bad, 6]):
                seen.append(record.result)
    assert sorted(seen) == [1, 2]


class Mine(BaseException):
    """Of the user's own making."""


@pytest.mark.timeout(20)
@pytest.mark.parametrize("error", [RuntimeError, OSError, StopIteration, SystemExit, KeyboardInterrupt, Mine])
def test_what_the_users_generator_raises_reaches_the_caller_after_the_records(
    mine: Leftovers, error: type[BaseException]
) -> None:
    class Tasks:
        """Not a generator, in which Python would replace StopIteration."""

        def __iter__(self) -> Iterator[int]:
            yield from (2, 4)
            if error is StopIteration:
                return
            raise error("mine")

    seen = []
    with start() as master:
        mine.note(master)
        try:
            for record in master.run(Tasks()):
                seen.append(record.result)
        except BaseException as raised:
            assert (type(raised), str(raised)) == (error, "mine")
        else:
            assert error is StopIteration
    assert sorted(seen) == [1, 2]


def test_after_a_bad_task_the_farm_runs_the_next_tasks(mine: Leftovers) -> None:
    with start() as master:
        with pytest.raises(TypeError):
            list(master.run([2, {3}]))
        assert [record.result for record in master.run([4])] == [2]


# ---- blocks that end early -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["the start", "a record", "the end"])
def test_a_block_that_raises_leaves_no_process_no_thread_and_no_port(mine: Leftovers, at: str) -> None:
    with pytest.raises(ZeroDivisionError), start(workers=2) as master:
        mine.note(master)
        if at == "the start":
            raise ZeroDivisionError
        for _record in master.run(range(10_000) if at == "a record" else [2, 4]):
            mine.note(master)
            if at == "a record":
                raise ZeroDivisionError
        raise ZeroDivisionError
    mine.check()


def test_a_task_that_runs_is_lost_with_the_block(mine: Leftovers) -> None:
    with pytest.raises(ZeroDivisionError), start(function="mine:wait") as master:
        for _record in master.run([0, 1000]):
            mine.note(master)
            raise ZeroDivisionError
    mine.check()


def test_a_generator_that_is_abandoned_leaves_nothing(mine: Leftovers) -> None:
    with start() as master:
        for _record in master.run(range(0, 20_000, 2)):
            mine.note(master)
            break
    mine.check()


def test_a_farm_whose_tasks_were_abandoned_runs_others_or_says_that_it_does_not(mine: Leftovers) -> None:
    with start() as master:
        for _record in master.run(range(0, 2000, 2)):
            break
        try:
            results = [record.result for record in master.run([2, 4])]
        except (Failure, RuntimeError, ValueError):
            return
    assert sorted(results) == [1, 2]


def test_a_farm_that_was_never_asked_anything_leaves_nothing(mine: Leftovers) -> None:
    with start() as master:
        mine.note(master)
    mine.check()


# ---- a farm that cannot start --------------------------------------------------------------------------------------


def test_a_function_without_workers_is_refused(mine: Leftovers) -> None:
    with pytest.raises(Failure, match="there are none"):
        start(workers=0)


def test_a_port_in_use_is_refused(mine: Leftovers) -> None:
    with start(workers=0, function=None) as first, pytest.raises(Failure, match="already in use") as raised:
        TaskMaster(port=first.address[1], authkey=KEY, workers=1).start()
    assert raised.value.status == 3


@pytest.mark.timeout(20)
def test_a_function_that_does_not_exist_ends_the_run(mine: Leftovers) -> None:
    with start(function="mine:missing") as master, pytest.raises(Failure, match="local worker"):
        list(master.run([2]))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "key", [b"\0" * 20, bytes(range(20)), bytes(range(128, 160)), b"ends with a newline\n", b" starts with a space"], ids=repr
)
def test_any_bytes_are_a_key_or_are_refused_at_once(mine: Leftovers, key: bytes) -> None:
    try:
        master = start(authkey=key)
    except Failure:
        return
    with master:
        assert [record.result for record in master.run([2])] == [1]


def test_without_an_authkey_the_key_file_is_made(mine: Leftovers, tmp_path: Path) -> None:
    with start(authkey=None) as master:
        assert [record.result for record in master.run([2])] == [1]
    assert (tmp_path / ".task_authkey").stat().st_mode & 0o077 == 0


# ---- scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_default_start_method_does_not_matter(farm: Farm, method: str) -> None:
    (farm.folder / "mine.py").write_text(MINE)
    (farm.folder / "script.py").write_text(SCRIPT)
    program = farm.run(farm.folder / "script.py", method, env=farm.env(PYTHONPATH=str(ROOT)))
    assert program.wait() == 0, program.stderr
    assert program.stdout == [f"{sum(n // 2 for n in range(0, 20, 2))} {method}"]


def test_a_script_needs_no_main_guard(farm: Farm) -> None:
    (farm.folder / "script.py").write_text(UNGUARDED)
    program = farm.run(farm.folder / "script.py", env=farm.env(PYTHONPATH=str(ROOT)))
    assert program.wait() == 0, program.stderr
    assert program.stdout == ["['3 * 3 = 9', '4 * 4 = 16']"]

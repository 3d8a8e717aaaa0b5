"""The farm from Python: `with TaskMaster(...) as master: for record in master.run(tasks)`.

Its arguments are checked as on the command line, it runs one job at a time, and it leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import functools
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
from lab import PATIENCE, ROOT, Farm, is_alive, wait_until

import task_master
from task_master import Failure, TaskMaster

KEY = b"a key of more than 16 bytes"
MINE = """
import time

def halve(n):
    if n % 2:
        raise ValueError(f"{n} is odd")
    return n // 2

def nest(n):
    return [nest(n - 1)] if n else n

def fill(n):
    time.sleep(0.001)
    return "x" * n
"""


class Mine:
    """The farms of a test, in a folder with mine.py, and what they start."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._children = set(psutil.Process().children(recursive=True))
        self._started: set[psutil.Process] = set()
        self._ports: set[int] = set()

    @contextlib.contextmanager
    def start(self, workers: int = 1, function: str | None = "mine:halve", **options: Any) -> Iterator[TaskMaster]:
        with TaskMaster(workers=workers, function=function, **{"port": 0, "authkey": KEY, **options}) as master:
            self._ports.add(master.address[1])
            try:
                yield master
            finally:
                self._started |= set(psutil.Process().children(recursive=True)) - self._children

    def results(self, tasks: Any, **options: Any) -> list[Any]:
        """What becomes of tasks in a farm of their own, in their order."""
        with self.start(**options) as master:
            return [record.result for record in sorted(master.run(tasks))]

    def check(self) -> None:
        """Nothing is left, but for what is about to end."""
        for thread in set(threading.enumerate()) - self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{thread} is left behind"
        started = self._started | set(psutil.Process().children(recursive=True)) - self._children
        wait_until(lambda: not [process for process in started if is_alive(process)])
        listening = {conn.laddr.port for conn in psutil.Process().net_connections() if conn.status == psutil.CONN_LISTEN}
        assert not listening & self._ports  # not by a connection: by now another program may have been given the number


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mine]:
    """In a folder of its own, with an empty home; afterwards nothing may be left of any farm."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("TASK_", "PYTHON"))]:
        monkeypatch.delenv(name)
    mine = Mine()
    yield mine
    mine.check()


def test_records_say_what_became_of_each_task(mine: Mine) -> None:
    began_at = time.time()
    with mine.start(workers=2) as master:
        records = sorted(master.run([4, 7, 10]))
    found = [(record.id, record.task, record.ok, record.result, record.attempts) for record in records]
    assert found == [(0, 4, True, 2, 1), (1, 7, False, None, 1), (2, 10, True, 5, 1)]
    assert [record.error for record in records if record.ok] == [None, None]
    error = records[1].error
    assert error
    assert (error["type"], error["message"]) == ("ValueError", "7 is odd")
    assert "in halve" in error["traceback"]
    assert all(began_at - 0.002 <= record.started_at <= time.time() + 0.002 for record in records)
    assert all(record.seconds is not None and record.seconds >= 0 for record in records)
    assert all(record.worker.startswith(socket.gethostname() + "/") for record in records)


def test_a_farm_that_was_started_is_not_started_again_by_its_block(mine: Mine) -> None:
    with mine.start() as master, master as same:
        assert [record.result for record in same.run([4])] == [2]


def test_what_numpy_has_is_a_task_too(mine: Mine) -> None:
    numpy = pytest.importorskip("numpy")
    assert mine.results(numpy.arange(0, 6, 2)) == [0, 1, 2]
    assert mine.results([numpy.array([1.5, 2])], function="builtins:list") == [[1.5, 2.0]]


def test_any_json_value_is_a_task(mine: Mine) -> None:
    values = [None, True, 0, -1.5, "ü\n\ud800", [1, [2]], {"a": {"b": None}}, (1, 2)]
    with mine.start(function="builtins:repr") as master:
        records = sorted(master.run(values))
    assert [record.task for record in records[:-1]] == values[:-1]
    assert [record.result for record in records] == [*map(repr, values[:-1]), "[1, 2]"]  # JSON has no tuples


def test_a_result_that_cannot_be_read_here_is_an_error_of_that_task(mine: Mine) -> None:
    """As one that is nested too deeply for the stack that is left where the records are asked for, on Python up to 3.11."""
    with mine.start(function="mine:nest") as master:

        def ask(depth: int) -> Any:
            return ask(depth - 1) if depth else list(master.run([800, 1]))

        deep, flat = sorted(ask(600))
    assert (flat.result, deep.task, deep.attempts) == ([1 - 1], 800, 1)
    assert deep.ok or (deep.result is None and "cannot be read" in deep.error["message"])


def test_a_run_begins_when_all_records_of_the_last_one_were_taken(mine: Mine) -> None:
    with mine.start() as master:
        first = master.run([2, 4])
        seen = [next(first)]
        wait_until(master.ledger.is_over)
        with pytest.raises(Failure, match="under way"):
            next(master.run([6]))
        seen += first
        assert sorted(record.result for record in seen) == [1, 2]
        assert [record.result for record in master.run([8])] == [4]


def test_one_of_two_runs_that_begin_at_the_same_time_is_refused(mine: Mine, monkeypatch: pytest.MonkeyPatch) -> None:
    with mine.start() as master, monkeypatch.context() as patch:

        def begin_both() -> None:
            patch.undo()
            master.ledger.begin()
            with pytest.raises(Failure):
                next(master.run([6]))

        patch.setattr(master.ledger, "begin", begin_both)
        assert [record.result for record in master.run([2])] == [1]


def test_a_farm_that_is_closed_meanwhile_is_a_failure(mine: Mine) -> None:
    with mine.start() as master, pytest.raises(Failure, match="closed before"):
        for _record in master.run(itertools.count(0, 2)):
            master.close()


def test_what_log_raises_ends_the_run(mine: Mine) -> None:
    def log(text: str) -> None:
        if "failed" in text:
            raise ZeroDivisionError(text)

    with mine.start(log=log) as master, pytest.raises(ZeroDivisionError, match="task 1 failed"):
        list(master.run([2, 1, 4]))


def test_run_without_start_or_after_the_end_is_a_failure(mine: Mine) -> None:
    with mine.start() as master:
        pass
    for closed in (TaskMaster(port=0, authkey=KEY), master):
        with pytest.raises(Failure, match=r"with|start|closed"):
            next(iter(closed.run([2])))


def test_a_worker_from_elsewhere_may_do_the_work(farm: Farm, mine: Mine) -> None:
    said: list[str] = []
    with mine.start(workers=0, function=None, authkey=farm.key.encode(), log=said.append) as master:
        worker = farm.worker(master.address[1], "--function", "functions:double")
        records = list(master.run(["ab"]))
    assert worker.wait() == 0
    assert [(record.result, record.worker) for record in records] == [("abab", worker.name())]
    assert said.count(f"worker {worker.name()} connected") == 1


def test_a_farm_may_be_run_by_any_thread(mine: Mine) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(mine.results([2, 4])))
    thread.start()
    thread.join(PATIENCE)
    assert results == [1, 2]


def test_tasks_are_asked_for_one_by_one_while_no_other_run_begins_and_the_next_run_counts_from_0(mine: Mine) -> None:
    tasks: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    with mine.start() as master:
        for _again in range(2):
            tasks.put(2)
            seen = []
            for record in master.run(iter(tasks.get, None)):
                seen.append((record.id, record.task, record.result))
                with pytest.raises(Failure, match="run"):
                    next(iter(master.run([100])))
                tasks.put(2 * len(seen) + 2 if len(seen) < 4 else None)
            assert seen == [(0, 2, 1), (1, 4, 2), (2, 6, 3), (3, 8, 4)]
        assert [*master.run([])] == []


def test_an_endless_iterable_is_read_while_there_is_room_and_ends_with_the_interest_in_it(mine: Mine) -> None:
    read = 0
    closed = threading.Event()

    def count() -> Iterator[int]:
        nonlocal read
        try:
            for read in itertools.count():
                yield 2 * read
        finally:
            closed.set()

    with mine.start() as master:
        for _record in master.run(count()):
            before = -1
            while before != read:  # until nothing is read for a while, though it could be
                before = read
                time.sleep(0.3)
            break
        assert closed.wait(PATIENCE)


class OfMyOwn(BaseException):
    """Of the user's making."""


def fail(error: type[BaseException]) -> Iterator[int]:
    """An iterable of two tasks, and then an error."""
    yield from (2, 4)
    raise error("mine")


ERRORS: list[type[BaseException]] = [RuntimeError, OSError, SystemExit, KeyboardInterrupt, OfMyOwn]
BAD = [
    ({1, 2}, TypeError),
    (float("nan"), ValueError),
    (b"bytes", TypeError),
    (object(), TypeError),
    ("x" * (61 << 20), ValueError),
]


@pytest.mark.parametrize(
    ("make_tasks", "error", "message"),
    [
        *[(functools.partial(fail, error), error, "mine") for error in ERRORS],
        *[(functools.partial(list, [2, 4, bad, 6]), error, None) for bad, error in BAD],
    ],
)
def test_what_the_iterable_raises_or_has_that_is_no_json_is_raised_after_the_records_of_those_before_it(
    mine: Mine, make_tasks: Any, error: type[BaseException], message: str | None
) -> None:
    seen = []
    with mine.start() as master:
        with pytest.raises(error, match=message) as raised:
            for record in master.run(make_tasks()):
                seen.append(record.result)
        assert [record.result for record in master.run([4])] == [2]
    assert sorted(seen) == [1, 2]
    assert raised.type is error


@pytest.mark.parametrize("at", ["the start", "a record", "the end", "no time"])
def test_a_block_that_raises_or_was_never_used_leaves_nothing_and_its_port_is_free(
    mine: Mine, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A task that runs then is lost with the block, which does not wait for it."""
    monkeypatch.setattr(task_master, "GOODBYE", 1e9)
    port = 0
    for _ in range(3):
        with contextlib.suppress(ZeroDivisionError), mine.start(workers=2, port=port, function="time:sleep") as master:
            port = master.address[1]
            if at == "the start":
                raise ZeroDivisionError
            for _record in master.run([0, 1000 * (at == "a record")]) if at != "no time" else ():
                if at == "a record":
                    raise ZeroDivisionError
            if at == "the end":
                raise ZeroDivisionError


@pytest.mark.parametrize("count", [2, 20_000])
def test_a_farm_whose_run_was_left_early_says_that_it_runs_no_other(mine: Mine, count: int) -> None:
    """Also when all was done by then."""
    with mine.start() as master:
        records = master.run(range(0, 2 * count, 2))
        next(records)
        wait_until(lambda: master.ledger.is_over() or count > 2)
        records.close()
        with pytest.raises(Failure, match="ended early"):
            next(master.run([2, 4]))


def test_large_results_wait_for_a_slow_caller_at_the_workers(mine: Mine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_master, "READY_BYTES", 1_000_000)
    with mine.start(function="mine:fill") as master:
        records = master.run([100_000] * 300)
        next(records)
        done = 0
        while done != master.ledger.done:  # until no more are recorded for a while, though they could be
            done = master.ledger.done
            time.sleep(0.5)
        assert done < 250
        assert len([*records]) == 299


@pytest.mark.parametrize("tasks", [[1, 3], [1] * 10], ids=["the last task counts", "tasks are left"])
def test_failures_are_counted_for_each_run_and_too_many_end_it(mine: Mine, tasks: list[int]) -> None:
    with mine.start(max_failures=2, log=lambda text: time.sleep(0.05)) as master:
        for _again in range(2):
            assert [record.ok for record in master.run([1])] == [False]
        with pytest.raises(Failure, match=r"^stopped, as --max-failures 2 asks") as raised:
            list(master.run(tasks))
    assert raised.value.status == 1


WRONG: list[tuple[str, Any]] = [
    *[("port", value) for value in (70000, -1, "5000", "http", None, 1.5, b"80")],
    *[("retries", value) for value in ("3", -1, 1.5, None)],
    *[("redeliveries", value) for value in ("2", -1, 0.5)],
    *[("timeout", value) for value in (-1, 0, "5", float("nan"), float("-inf"))],
    *[("workers", value) for value in (-1, "2", 1.5)],
    *[("max_failures", value) for value in (0, -1, "3", 2.5)],
    *[("function", value) for value in (len, "sqrt", ":sqrt", "math:", "", b"math:sqrt", "./math.py:sqrt")],
    *[("command", value) for value in (5, ["true"], 'echo "{}"', "sort | uniq")],
    *[("authkey", value) for value in ("abc", b"", b"  \n", 5)],
    *[("host", value) for value in (5, b"127.0.0.1")],
    *[(name, value) for name in ("tls", "quiet", "log") for value in ("no", 5)],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:20] if not isinstance(value, str) else value)
def test_a_wrong_argument_is_a_failure_that_names_it(mine: Mine, name: str, value: Any) -> None:
    options = {name: value, **({"function": None} if name == "command" else {})}
    with pytest.raises(Failure, match=f"{name}|--{name.replace('_', '-')}"), mine.start(**options):
        pytest.fail("it started")


def test_function_and_command_are_not_for_one_job(mine: Mine) -> None:
    with pytest.raises(Failure, match=r"function.*command|command.*function"), mine.start(command="true {}"):
        pytest.fail("it started")


@pytest.mark.parametrize("function", ["mine:missing", "mine:\ud800", "mine:\0"], ids=ascii)
def test_a_function_that_no_worker_can_load_ends_the_run(mine: Mine, function: str) -> None:
    with pytest.raises(Failure, match="local worker"):
        mine.results([2], function=function)


def test_a_farm_that_can_have_no_thread_to_read_what_its_worker_says_ends(mine: Mine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scarce(threading.Thread):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.missing = options["target"].__name__ == "_relay"

        def start(self) -> None:
            if self.missing:
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(threading, "Thread", Scarce)
    with contextlib.suppress(Failure), mine.start() as master:  # a worker may do it meanwhile
        assert [record.result for record in master.run([2])] == [1]


@pytest.mark.parametrize(
    "key", [b"\0" * 20, bytes(range(20)), bytes(range(128, 160)), b"ends with a newline\n", b" starts with a space"], ids=repr
)
def test_any_bytes_are_a_key_or_are_refused_at_once(mine: Mine, key: bytes) -> None:
    try:
        TaskMaster(port=0, authkey=key)
    except Failure:
        return
    assert mine.results([2], authkey=key) == [1]


FORKED = """
import os
import warnings

from task_master import Failure, TaskMaster

warnings.simplefilter("ignore")  # newer Pythons do not like what this does
with TaskMaster(port=0, workers=1, function="mine:halve") as master:
    child = os.fork()
    if not child:
        try:
            next(master.run([2]))
        except Failure as failure:
            print(failure, flush=True)
        master.close()
        os._exit(0)
    os.waitpid(child, 0)
    print([record.result for record in master.run([4])])
"""


def test_a_farm_belongs_to_the_process_that_has_opened_it(farm: Farm) -> None:
    """A fork, as of a web server that loads the program before it forks, can neither use nor close it."""
    farm.write("mine.py", MINE)
    script = farm.run(farm.write("forked.py", FORKED), env=farm.env(PYTHONPATH=str(ROOT)))
    assert script.wait() == 0, script.stderr
    assert "has forked this one" in script.stdout[0] and script.stdout[1] == "[2]"


SCRIPT = """
import multiprocessing
import sys

from task_master import TaskMaster

multiprocessing.set_start_method(sys.argv[1])
tasks = (n for n in [3, 4])  # nothing here could be sent to another process
with TaskMaster(port=0, workers=2, log=lambda line: None) as master:
    print(sorted(record.result for record in master.run(tasks)), multiprocessing.get_start_method())
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_script_needs_no_main_guard_and_the_default_start_method_does_not_matter(farm: Farm, method: str) -> None:
    program = farm.run(farm.write("script.py", SCRIPT), method, env=farm.env(PYTHONPATH=str(ROOT)))
    assert program.wait() == 0, program.stderr
    assert program.stdout == [f"['3 * 3 = 9', '4 * 4 = 16'] {method}"]


@pytest.mark.parametrize(
    ("ok", "outcome", "expected"),
    [
        (True, '"result": 1 , "started_at" : 1, "seconds": 2', 1),
        (True, '"result": 1, "started_at": 1, "seconds": 2, "result": 5', 5),
        (True, f'"result": {"1" * 5000}, "started_at": 1, "seconds": 2', None),
        (False, '"error": null, "error": {"type": "E", "message": ""}, "started_at": 1, "seconds": 2', None),
    ],
)
def test_an_outcome_that_is_not_written_as_ours_is_a_record_nevertheless(ok: bool, outcome: str, expected: object) -> None:
    task = task_master.Task(7, "[1]")
    task.ok, task.outcome = ok, outcome
    (record,) = task_master.make_records([task], "host/1", 5)
    assert (record.id, record.task, record.result, record.ok) == (2, [1], expected, expected is not None)

"""Every way a function can misbehave costs that very task, and nobody else anything."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Farm, Program

from task_worker import Child, ChildDied

POISON = r'''
import ctypes, os, re, signal, subprocess, sys, threading, time

class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")

class Abrupt(Exception):
    def __str__(self):
        os._exit(7)

class Nameless(type):
    def __getattribute__(cls, name):
        raise RuntimeError("no name")

class Masked(Exception, metaclass=Nameless):
    pass

def throw(error):
    raise error

def chain():
    error = None
    for n in range(3000):
        following = ValueError(n)
        following.__cause__ = error
        error = following
    error.__cause__.__context__ = error
    raise error

def recurse(n=0):
    return recurse(n + 1)

def crash_the_stack():
    nested = ()
    for _ in range(1_000_000):
        nested = (nested,)
    return hash(nested)

def circle():
    ring = []
    ring.append(ring)
    return ring

def nest():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    return nested

def note(name, pid):
    with open(f"pid.{name}", "w") as file:
        file.write(str(pid))

def sleep_with_grandchildren():
    note("spawned", subprocess.Popen(["sleep", "1000"]).pid)
    forked = os.fork()
    if not forked:
        time.sleep(1000)
        os._exit(0)
    note("forked", forked)
    time.sleep(1000)

def exit_beside_a_grandchild():
    """The grandchild keeps the pipe of its dead parent open."""
    if not os.fork():
        time.sleep(5)
        os._exit(0)
    os._exit(3)

def return_twice():
    os.fork()
    return "returned"

def close_everything():
    os.closerange(0, 1000)
    return "closed"

def replace_stdout():
    sys.stdout = sys.stderr = None
    return "replaced"

def catch(error):
    """Ends with a signal that it sends to itself."""
    os.kill(os.getpid(), error)
    time.sleep(1000)

def ignore_signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

def stubborn():
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass

WAYS = {
    "system exit": lambda: sys.exit(3),
    "system exit without a reason": lambda: sys.exit(),
    "keyboard interrupt": lambda: throw(KeyboardInterrupt()),
    "generator exit": lambda: throw(GeneratorExit()),
    "stop iteration": lambda: throw(StopIteration()),
    "end of file": lambda: throw(EOFError()),
    "broken pipe": lambda: throw(BrokenPipeError()),
    "out of memory": lambda: bytearray(1 << 60),
    "unspeakable": lambda: throw(Unspeakable()),
    "abrupt": lambda: throw(Abrupt()),
    "masked": lambda: throw(Masked()),
    "long message": lambda: throw(ValueError("m" * 50_000_000)),
    "surrogates and newlines": lambda: throw(ValueError("\ud800\n\r\0\u2028")),
    "chain": chain,
    "os._exit(0)": lambda: os._exit(0),
    "os._exit(9)": lambda: os._exit(9),
    "exit beside a grandchild": exit_beside_a_grandchild,
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "stack overflow": crash_the_stack,
    "SIGKILL": lambda: catch(signal.SIGKILL),
    "SIGTERM": lambda: catch(signal.SIGTERM),
    "SIGINT": lambda: catch(signal.SIGINT),
    "SIGKILL to the group": lambda: os.kill(0, signal.SIGKILL),
    "SIGSTOP": lambda: catch(signal.SIGSTOP),
    "endless loop": lambda: [None for _ in iter(int, 1)],
    "endless sleep": lambda: time.sleep(1e6),
    "endless loop that catches all": stubborn,
    "endless loop in C": lambda: re.match(r"(a|a)*$", "a" * 500 + "b"),
    "sleep in C with the lock held": lambda: ctypes.PyDLL(None).sleep(1000),
    "sleep with grandchildren": sleep_with_grandchildren,
    "recursion": recurse,
    "no JSON": object,
    "a set": lambda: {1, 2},
    "bytes": lambda: b"raw",
    "not a number": lambda: float("nan"),
    "a circle": circle,
    "nested too deeply": nest,
    "too large": lambda: "x" * (63 << 20),
    "read a line": input,
    "close everything": close_everything,
    # these do no harm to themselves, and must not harm others
    "close stdout": lambda: sys.stdout.close(),
    "close stderr": lambda: sys.stderr.close(),
    "close descriptors 0 to 2": lambda: os.closerange(0, 3),
    "replace stdout": replace_stdout,
    "a megabyte of prints": lambda: print("y" * 100 + "\n", end="") or [print("z" * 1023) for _ in range(1024)][0],
    "read standard input": lambda: sys.stdin.read(),
    "read descriptor 0": lambda: len(os.read(0, 1)),
    "a child that reads descriptor 0": lambda: subprocess.run(["cat"], stdout=subprocess.PIPE).stdout.decode(),
    "return twice": return_twice,
    "surrogate as a result": lambda: "\ud800",
    "change of folder": lambda: os.chdir("/"),
    "daemon thread": lambda: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(),
    "thread": lambda: threading.Thread(target=time.sleep, args=(2,)).start(),
    "ignore signals": ignore_signals,
    "recursion limit": lambda: sys.setrecursionlimit(10_000),
}

def run(task):
    if isinstance(task, str):
        return WAYS[task]()
    print("good", task, "." * 200)
    return 2 * task
'''

# What becomes of each: the type of its error, or the result.
ERRORS = {
    "system exit": "SystemExit",
    "system exit without a reason": "SystemExit",
    "keyboard interrupt": "KeyboardInterrupt",
    "generator exit": "GeneratorExit",
    "stop iteration": "StopIteration",
    "end of file": "EOFError",
    "broken pipe": "BrokenPipeError",
    "out of memory": "MemoryError",
    "unspeakable": "Unspeakable",
    "abrupt": "ProcessDied",
    "masked": None,  # any type will do
    "long message": "ValueError",
    "surrogates and newlines": "ValueError",
    "chain": "ValueError",
    "os._exit(0)": "ProcessDied",
    "os._exit(9)": "ProcessDied",
    "exit beside a grandchild": "ProcessDied",
    "segfault": "ProcessDied",
    "abort": "ProcessDied",
    "stack overflow": "ProcessDied",
    "SIGKILL": "ProcessDied",
    "SIGTERM": "ProcessDied",
    "SIGINT": "KeyboardInterrupt",
    "SIGKILL to the group": "ProcessDied",
    "SIGSTOP": "TimeoutError",
    "endless loop": "TimeoutError",
    "endless sleep": "TimeoutError",
    "endless loop that catches all": "TimeoutError",
    "endless loop in C": "TimeoutError",
    "sleep in C with the lock held": "TimeoutError",
    "sleep with grandchildren": "TimeoutError",
    "recursion": "RecursionError",
    "no JSON": "TypeError",
    "a set": "TypeError",
    "bytes": "TypeError",
    "not a number": "ValueError",
    "a circle": "ValueError",
    "nested too deeply": "RecursionError",
    "too large": "ValueError",
    "read a line": "EOFError",
}
RESULTS = {
    "a megabyte of prints": None,
    "read standard input": "",
    "surrogate as a result": "\ud800",
    "daemon thread": None,
    "thread": None,
    "ignore signals": None,
    "change of folder": None,
    "recursion limit": None,
}
# These spoil the process that runs the tasks behind them, too; what becomes of themselves matters less.
TAMPERINGS = {
    "close everything",
    "close stdout",
    "close stderr",
    "close descriptors 0 to 2",
    "replace stdout",
    "return twice",
}
READINGS = ("read descriptor 0", "a child that reads descriptor 0")
GOOD = 12  # good tasks behind each bad one
TIME_LIMIT = 3  # seconds; no good task takes as long, however busy the machine is


class Job:
    """What became of one job in which all of them stand among good tasks."""

    def __init__(self, farm: Farm) -> None:
        self.folder = farm.folder
        (farm.folder / "poison.py").write_text(POISON)
        tasks: list[Any] = []
        for way in [*ERRORS, *RESULTS]:
            tasks += [*range(len(tasks), len(tasks) + GOOD), way]
        farm.write_tasks([*tasks, *range(len(tasks), len(tasks) + GOOD)])
        self.master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", "--timeout", TIME_LIMIT)
        self.worker = farm.worker(self.master, "--processes", 6, "--function", "poison:run")
        self.status = self.master.wait(40)
        self.worker_status = self.worker.wait()
        self.records = farm.records()
        self.bad = {record["task"]: record for record in self.records if isinstance(record["task"], str)}


@pytest.fixture
def farm(farm: Farm) -> Iterator[Farm]:
    yield farm
    for program in farm.programs:
        if program.process.stdin:
            program.process.stdin.close()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    farm = Farm(tmp_path_factory.mktemp("poison"))
    try:
        yield Job(farm)
    finally:
        farm.close()


def test_all_tasks_of_the_job_are_recorded_once(job: Job) -> None:
    assert sorted(record["id"] for record in job.records) == list(range(len(job.records)))
    assert len(job.bad) == len(ERRORS) + len(RESULTS)


def test_the_worker_lives_through_it_all(job: Job) -> None:
    assert (job.status, job.worker_status) == (1, 0), job.worker.stderr
    assert job.worker.stdout[-1] == "worker exit."


def test_no_good_task_is_hurt(job: Job) -> None:
    good = [record for record in job.records if not isinstance(record["task"], str)]
    hurt = [record for record in good if record.get("result") != 2 * record["task"] or record["attempts"] != 1]
    assert not hurt, [(record["id"], record.get("error"), record["attempts"]) for record in hurt]


def test_there_is_a_case_for_each_way_to_misbehave() -> None:
    names: dict[str, Any] = {}
    exec(POISON, names)
    assert set(names["WAYS"]) == {*ERRORS, *RESULTS, *TAMPERINGS, *READINGS}


@pytest.mark.parametrize("way", ERRORS)
def test_a_task_that_misbehaves_gets_an_error_record_of_its_own(job: Job, way: str) -> None:
    record = job.bad[way]
    assert "error" in record, record
    assert ERRORS[way] in (record["error"]["type"], None), record
    assert record["attempts"] == 1
    assert len(json.dumps(record)) < 100_000


@pytest.mark.parametrize("way", RESULTS)
def test_a_task_that_does_no_harm_keeps_its_result(job: Job, way: str) -> None:
    record = job.bad[way]
    assert record.get("result", record) == RESULTS[way]
    assert record["attempts"] == 1


@pytest.mark.parametrize("way", sorted(TAMPERINGS))
def test_a_task_that_tampers_with_its_process_hurts_no_other(farm: Farm, way: str) -> None:
    (farm.folder / "poison.py").write_text(POISON)
    farm.write_tasks([*range(40), way, *range(41, 160)])
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    worker = farm.worker(master, "--function", "poison:run")
    assert master.wait(10) in (0, 1)
    assert worker.wait() == 0
    records = farm.records()
    assert sorted(record["id"] for record in records) == list(range(160))
    assert {record["id"]: record.get("error") for record in records if "error" in record and record["id"] != 40} == {}
    assert {record["attempts"] for record in records} == {1}


def test_a_fork_that_python_does_not_see_runs_no_other_task_twice(farm: Farm) -> None:
    (farm.folder / "forks.py").write_text(
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "def fork(n):\n"
        "    if n in (5, 50):\n"
        "        libc.fork()\n"
        "    descriptor = os.open('ran.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "    os.write(descriptor, b'%d\\n' % n)\n"
        "    return n\n"
    )
    farm.write_tasks(list(range(100)))
    what = ("--workers", 1, "--function", "forks:fork")
    assert farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", *what).wait() == 0
    assert sorted(record["result"] for record in farm.records()) == list(range(100))
    ran = [int(line) for line in (farm.folder / "ran.log").read_text().split()]
    assert sorted(n for n in ran if n not in (5, 50)) == [n for n in range(100) if n not in (5, 50)]


def test_the_last_words_of_a_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that come between the look at its pipe and the look whether it lives."""
    child = Child("math:sqrt", None)
    child.start()
    while child.receive(1.0) is None:
        pass
    process = child._process

    def is_alive() -> bool:
        child.feed(["0 9"])
        while not child._poll(1.0):
            pass
        process.kill()
        process.join()
        return False

    monkeypatch.setattr(process, "is_alive", is_alive)
    assert (child.receive(0.0) or b"").startswith(b'.0\n"result": 3.0')
    monkeypatch.undo()
    with pytest.raises(ChildDied):
        child.receive(1.0)


def test_standard_input_is_empty_for_a_task(farm: Farm) -> None:
    (farm.folder / "poison.py").write_text(POISON)
    farm.write_tasks([*READINGS, "read standard input"])
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", "--timeout", 2)
    farm.worker(master, "--function", "poison:run", stdin=subprocess.PIPE)  # which stays open and silent
    assert master.wait() == 0, farm.records()
    assert [record["result"] for record in farm.records()] == [0, "", ""]


def test_how_a_process_died_is_told(job: Job) -> None:
    assert "SIGSEGV" in job.bad["segfault"]["error"]["message"]
    assert "SIGKILL" in job.bad["SIGKILL"]["error"]["message"]
    assert "exit status 9" in job.bad["os._exit(9)"]["error"]["message"]
    assert f"{TIME_LIMIT} s" in job.bad["endless sleep"]["error"]["message"]


def test_each_failure_is_one_line_with_task_worker_attempt_and_reason(job: Job) -> None:
    for way in ("segfault", "endless loop", "surrogates and newlines"):
        record = job.bad[way]
        lines = [line for line in job.master.stderr if f"task {record['id']} failed" in line]
        assert lines
        assert all(text in lines[0] for text in (record["error"]["type"], record["worker"], "attempt 1"))


@pytest.mark.parametrize("name", ["spawned", "forked"])
def test_a_time_limit_kills_the_grandchildren_too(job: Job, name: str) -> None:
    assert not psutil.pid_exists(int((job.folder / f"pid.{name}").read_text()))


def test_nothing_printed_a_traceback_of_ours(job: Job) -> None:
    assert not any("Traceback" in line for line in job.master.stderr)
    assert not any("internal error" in line for line in job.worker.stderr)


def test_retries_of_a_task_that_misbehaves_are_counted_and_said(farm: Farm) -> None:
    (farm.folder / "poison.py").write_text(POISON)
    farm.write_tasks([1, "segfault", 2, "system exit", 3])
    what = ("--retries", 2, "--workers", 1, "--function", "poison:run")
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", *what)
    assert master.wait() == 1
    assert {record["task"]: record["attempts"] for record in farm.records()} == {
        1: 1,
        2: 1,
        3: 1,
        "segfault": 3,
        "system exit": 3,
    }
    retries = [line for line in master.stderr if "task 1 is retried" in line]
    assert ["attempt 1" in retries[0], "attempt 2" in retries[1]] == [True, True]
    assert all("ProcessDied" in line and "SIGSEGV" in line for line in retries)
    assert any("2 failed, 4 retried" in line for line in master.stderr), master.stderr


def test_large_results_that_do_not_fit_one_message_together_are_all_recorded(farm: Farm) -> None:
    (farm.folder / "large.py").write_text("def make(n):\n    return 'x' * n\n")
    farm.write_tasks([*[1] * 60, 7_900_000, 60_000_000, *[1] * 20])
    what = ("--workers", 1, "--function", "large:make")
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", *what)
    assert master.wait() == 0
    records = farm.records()
    assert [len(record["result"]) for record in records] == [record["task"] for record in records]
    assert {record["attempts"] for record in records} == {1}


def test_a_result_nested_as_deeply_as_json_allows_is_printed_recorded_and_kept(farm: Farm) -> None:
    (farm.folder / "deep.py").write_text("def nest(n):\n    x = 1\n    for _ in range(n):\n        x = [x]\n    return x\n")
    farm.write_tasks(list(range(900, 1010, 2)))
    what = ("--tasks", "tasks.jsonl", "--workers", 1, "--function", "deep:nest")
    printed, recorded = farm.master(*what), farm.master(*what, "--results", "results.jsonl")
    printed.wait()
    recorded.wait()
    good = {record["id"] for record in map(split_record, read_lines(farm)) if record["ok"]}
    failed = {int(match) for line in printed.stderr for match in re.findall(r"task (\d+) failed", line)}
    results = [line for line in printed.stdout if line.startswith("Result: [[")]
    assert len(results) + len(failed) == 55, "a task without a result has failed"
    resumed = farm.master(*what, "--results", "results.jsonl", "--resume")
    resumed.wait()
    assert good <= {record["id"] for record in map(split_record, read_lines(farm)) if record["ok"]}
    assert len(read_lines(farm)) == 55
    ran_again = int(resumed.wait_line(r"(\d+) done, (\d+) failed").group(1))
    assert ran_again == 0, "none of those that succeeded runs again"
    assert not any("Traceback" in line for line in [*printed.stderr, *recorded.stderr, *resumed.stderr])


def read_lines(farm: Farm) -> list[str]:
    return (farm.folder / "results.jsonl").read_text().splitlines()


def split_record(line: str) -> dict[str, Any]:
    """What a record says, without reading its result."""
    match = re.match(r'{"id": (\d+), "task": \d+, "(result|error)": ', line)
    assert match, line
    return {"id": int(match.group(1)), "ok": match.group(2) == "result"}


def wait_for(path: Path, program: Program) -> None:
    """Block until a file is there, which a task of the program makes."""
    for _ in range(600):
        if path.exists():
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(0.1)
            break
    pytest.fail(f"no {path.name}; got {program.lines}")


def test_a_process_killed_from_outside_costs_the_task_that_ran(farm: Farm) -> None:
    (farm.folder / "victim.py").write_text(
        "import os, time\ndef work(n):\n    if n == 5:\n        open('pid', 'w').write(str(os.getpid()))\n"
        "        os.replace('pid', 'running')\n        time.sleep(1000)\n    return n\n"
    )
    farm.write_tasks(list(range(10)))
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    worker = farm.worker(master, "--function", "victim:work")
    wait_for(farm.folder / "running", worker)
    os.kill(int((farm.folder / "running").read_text()), 9)
    assert (master.wait(), worker.wait()) == (1, 0)
    assert {record["id"]: record.get("error", {}).get("type") for record in farm.records()} == {
        n: "ProcessDied" if n == 5 else None for n in range(10)
    }

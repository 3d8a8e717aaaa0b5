"""Every way a function can misbehave costs that very task, and nobody else anything."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import ROOT, Farm, check_once, check_silence

MODULE = r'''
import ctypes, io, os, resource, signal, subprocess, sys, threading, time

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

def use_up_files():
    """So that not even a module can be imported any more."""
    sys.modules.pop("traceback", None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    kept = []
    while True:
        kept.append(open(os.devnull))

def crash_the_stack():
    nested = ()
    for _ in range(1_000_000):
        nested = (nested,)
    return hash(nested)

def nest():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    return nested

def exit_beside_a_grandchild():
    """The grandchild keeps the pipe of its dead parent open."""
    if not os.fork():
        time.sleep(5)
        os._exit(0)
    os._exit(3)

def close_and_stay():
    os.close(1)
    threading.Thread(target=time.sleep, args=(1000,)).start()

def close_everything():
    os.closerange(0, 1000)
    return "closed"

def close_the_rest(seconds):
    """With the pipe to the slot, and what tells that this process lives."""
    time.sleep(1)
    os.closerange(3, 1000)
    time.sleep(seconds)

def detach_stdout():
    sys.stdout = io.TextIOWrapper(sys.stdout.detach())

class Stuck:
    closed = False

    def flush(self):
        time.sleep(1000)

def hang_behind_the_task():
    sys.stdout = Stuck()

def end_while_it_hands_over():
    """A process beside it, which holds the pipe, kills this one when half of the result is written."""
    parent = os.getpid()

    def written():
        return int(open(f"/proc/{parent}/io").read().split("wchar: ")[1].split()[0])

    before = written()
    if not os.fork():
        if not os.fork():
            os.setsid()
            while written() < before + 5_000_000:
                pass
            os.kill(parent, signal.SIGKILL)
            time.sleep(1000)
        os._exit(0)
    return "x" * 50_000_000

def end_while_it_waits():
    """What it has forked keeps the pipe."""
    if not os.fork():
        time.sleep(1000)
    threading.Timer(1, lambda: (print("now", flush=True), os._exit(0))).start()

def hang_while_it_waits():
    threading.Timer(1, lambda: (print("now", flush=True), ctypes.PyDLL(None).sleep(1000))).start()

def write_into_sockets():
    for descriptor in range(3, 50):
        if os.path.realpath(f"/proc/self/fd/{descriptor}").rpartition("/")[2].startswith("socket:"):
            os.write(descriptor, b"garbage")

def replace_stdout():
    sys.stdout = sys.stderr = None
    return "replaced"

def catch(error, handler=None):
    """Ends with a signal that it sends to itself, though another task may have ignored it."""
    if handler is not None:  # SIG_DFL is 0
        signal.signal(error, handler)
    os.kill(os.getpid(), error)
    time.sleep(1000)

def ignore_signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

# What makes an error of its own task; and how that begins, as `TYPE: MESSAGE`
FAILING = {
    "system exit": ("SystemExit", lambda: sys.exit(3)),
    "keyboard interrupt": ("KeyboardInterrupt", lambda: throw(KeyboardInterrupt())),
    "broken pipe": ("BrokenPipeError", lambda: throw(BrokenPipeError())),
    "out of files": ("OSError: .*open files", use_up_files),
    "unspeakable": ("Unspeakable", lambda: throw(Unspeakable())),
    "abrupt": ("ProcessDied", lambda: throw(Abrupt())),
    "masked": (".*", lambda: throw(Masked())),
    "long message": ("ValueError", lambda: throw(ValueError("m" * 50_000_000))),
    "surrogates and newlines": ("ValueError", lambda: throw(ValueError("\ud800\n\r\0\u2028"))),
    "chain": ("ValueError", chain),
    "os._exit(0)": ("ProcessDied", lambda: os._exit(0)),
    "exit beside a grandchild": ("ProcessDied: .*exit status 3", exit_beside_a_grandchild),
    "segfault": ("ProcessDied: .*SIGSEGV", lambda: ctypes.string_at(0)),
    "stack overflow": ("ProcessDied|RecursionError", crash_the_stack),  # which Python 3.14 and newer see in time
    "SIGKILL": (r"ProcessDied: .*SIGKILL\) \(out of memory\?\)", lambda: catch(signal.SIGKILL)),
    "SIGTERM": ("ProcessDied", lambda: catch(signal.SIGTERM, signal.SIG_DFL)),
    "SIGINT": ("KeyboardInterrupt", lambda: catch(signal.SIGINT, signal.default_int_handler)),
    "SIGKILL to the group": ("ProcessDied", lambda: os.kill(0, signal.SIGKILL)),
    "SIGSTOP": ("TimeoutError", lambda: catch(signal.SIGSTOP)),
    "endless sleep": ("TimeoutError: .* 8 s", lambda: time.sleep(1e6)),
    "sleep in C with the lock held": ("TimeoutError", lambda: ctypes.PyDLL(None).sleep(1000)),
    "sleep without descriptors": ("TimeoutError", lambda: close_the_rest(1000)),
    "recursion": ("RecursionError", recurse),
    "nested too deeply": ("ValueError: .*nested too deeply", nest),
    "too large": ("ValueError: .*write it to a file", lambda: "x" * (63 << 20)),
    "read a line": ("EOFError", input),
}
# What does no harm, to itself or to others, and its result
HARMLESS = {
    "a megabyte of prints": (None, lambda: print("y" * 100 + "\n", end="") or [print("z" * 1023) for _ in range(1024)][0]),
    "a pipe that does not block": (None, lambda: os.set_blocking(1, False) or print("x" * 1_000_000)),
    "surrogate as a result": ("\ud800", lambda: "\ud800"),
    "change of folder": (None, lambda: os.chdir("/")),
    "daemon thread": (None, lambda: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()),
    "thread": (None, lambda: threading.Thread(target=time.sleep, args=(2,)).start()),
    "ignore signals": (None, ignore_signals),
    "recursion limit": (None, lambda: sys.setrecursionlimit(10_000)),
}
# What spoils the process that runs the tasks behind it, too; what becomes of itself matters less
SPOILING = {
    "close everything": close_everything,
    "close stdout": lambda: sys.stdout.close(),
    "close stderr": lambda: sys.stderr.close(),
    "close descriptors 0 to 2": lambda: os.closerange(0, 3),
    "close the other descriptors in a while": lambda: close_the_rest(0),
    "detach stdout": detach_stdout,
    "replace stdout": replace_stdout,
    "write into the pipe": write_into_sockets,
}
READING = {
    "read standard input": lambda: sys.stdin.read(),
    "read descriptor 0": lambda: len(os.read(0, 1)),
    "a child that reads descriptor 0": lambda: subprocess.run(["cat"], stdout=subprocess.PIPE).stdout.decode(),
}
WAYS = {name: way for name, (_, way) in [*FAILING.items(), *HARMLESS.items()]}
WAYS.update(SPOILING)
WAYS.update(READING)
WAYS.update(stay=close_and_stay, hang=hang_behind_the_task, end=end_while_it_hands_over)
WAYS.update({"end later": end_while_it_waits, "hang later": hang_while_it_waits})

def run(task):
    if isinstance(task, str):
        return WAYS[task]()
    print("good", task, "." * 200)
    return 2 * task
'''
NAMES: dict[str, Any] = {}
exec(MODULE, NAMES)
FAILING, HARMLESS = NAMES["FAILING"], NAMES["HARMLESS"]
GOOD = 12  # good tasks behind each bad one
TIME_LIMIT = 8  # seconds; no good task takes as long, however busy the machine is


class Job:
    def __init__(self, farm: Farm) -> None:
        tasks: list[Any] = []
        for way in [*FAILING, *HARMLESS]:
            tasks += [*range(len(tasks), len(tasks) + GOOD), way]
        farm.write_tasks([*tasks, *range(len(tasks), len(tasks) + GOOD)])
        self.master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", "--timeout", TIME_LIMIT)
        self.worker = farm.worker(self.master, "--processes", 6, "--function", "mod:run")
        self.statuses = self.master.wait(250), self.worker.wait()
        self.records = farm.records()
        self.bad = {record["task"]: record for record in self.records if isinstance(record["task"], str)}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    with contextlib.closing(Farm(tmp_path_factory.mktemp("poison"), MODULE)) as farm:
        yield Job(farm)


def test_all_tasks_are_recorded_once_and_the_worker_lives_through_it_all(job: Job) -> None:
    assert job.statuses == (1, 0), job.worker.stderr
    check_once(job.records, len(job.records))
    assert len(job.bad) == len(FAILING) + len(HARMLESS)
    assert job.worker.stdout[-1] == "worker exit."
    check_silence(job.master)
    assert not job.worker.said("internal error")


def test_no_good_task_is_hurt(job: Job) -> None:
    good = [record for record in job.records if not isinstance(record["task"], str)]
    hurt = [record for record in good if record.get("result") != 2 * record["task"] or record["attempts"] != 1]
    assert not hurt, [(record["id"], record.get("error"), record["attempts"]) for record in hurt]


@pytest.mark.parametrize("way", FAILING)
def test_a_task_that_misbehaves_gets_an_error_record_of_its_own(job: Job, way: str) -> None:
    record = job.bad[way]
    assert "error" in record, record
    assert re.match(FAILING[way][0], f"{record['error']['type']}: {record['error']['message']}"), record
    assert record["attempts"] == 1
    assert len(json.dumps(record)) < 100_000


@pytest.mark.parametrize("way", HARMLESS)
def test_a_task_that_does_no_harm_keeps_its_result(job: Job, way: str) -> None:
    record = job.bad[way]
    assert record.get("result", record) == HARMLESS[way][0]
    assert record["attempts"] == 1


def test_a_message_of_several_lines_is_told_in_one(job: Job) -> None:
    record = job.bad["surrogates and newlines"]
    (line,) = job.master.said(rf"task {record['id']} failed: ValueError: ")
    assert line.endswith(f'(task {record["id"]}, on {record["worker"]}: "surrogates and newlines"), attempt 1')


@pytest.mark.parametrize("way", [*NAMES["SPOILING"], pytest.param("stay", marks=pytest.mark.early)])
def test_a_task_that_tampers_with_its_process_hurts_no_other(farm: Farm, way: str) -> None:
    farm.write_tasks([way, *range(1, 40), way, *range(41, 160)])  # the first one is leased alone
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    worker = farm.worker(master, "--function", "mod:run")
    assert master.wait() in (0, 1)
    assert worker.wait() == 0
    records = farm.records()
    check_once(records, 160)
    assert [record for record in records if "error" in record and record["id"] not in (0, 40)] == []
    assert {record["attempts"] for record in records} == {1}
    assert not worker.said("lost the master|Traceback")


@pytest.mark.parametrize("way", [pytest.param("hang", marks=pytest.mark.early), "end"])
def test_a_process_that_does_not_get_to_its_next_task_is_replaced(farm: Farm, way: str) -> None:
    farm.write_tasks([way, *range(1, 20)])
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", *["--timeout", TIME_LIMIT] * (way == "hang"))
    farm.worker(master, "--function", "mod:run")
    assert master.wait() == (way == "end")
    first, *others = farm.in_order()
    assert first.get("error", {}).get("type") == (None if way == "hang" else "ProcessDied")
    assert [record["result"] for record in others] == [2 * n for n in range(1, 20)]


@pytest.mark.parametrize("way", ["end later", "hang later"])
def test_a_process_that_does_not_read_a_long_task_is_replaced(farm: Farm, way: str) -> None:
    master = farm.master("--tasks", "-", "--results", "results.jsonl", "--timeout", TIME_LIMIT, stdin=subprocess.PIPE)
    worker = farm.worker(master, "--function", "mod:run")
    master.put(json.dumps(way) + "\n")
    farm.wait_records(master, 1)
    worker.wait_line("^now$", "stdout")  # it ends or hangs
    master.give([json.dumps(["x" * 2_000_000])])
    assert master.wait() == 0
    assert farm.in_order()[1]["attempts"] == 1


def test_a_process_that_the_system_cannot_kill_is_given_up_at_its_time_limit(farm: Farm) -> None:
    """As in a driver that hangs."""
    master = farm.master("--results", "results.jsonl", "--timeout", TIME_LIMIT, '"endless sleep"', 1, 2)
    unkillable = "import task_worker; task_worker.kill_group = lambda process: None; raise SystemExit(task_worker.main())"
    options = ("--port", master.port(), "--processes", 1, "--function", "mod:run")
    farm.run("-c", unkillable, *options, env=farm.env(PYTHONPATH=str(ROOT)))
    assert master.wait() == 1
    assert [record.get("error", {}).get("type") for record in farm.in_order()] == ["TimeoutError", None, None]


SETUP = """
import os, time

if os.path.exists("died"):
    time.sleep(1000)

def run(n):
    if n == 5:
        open("died", "w").close()
        os._exit(1)
    return n
"""


def test_a_process_that_cannot_load_its_function_again_holds_no_tasks(farm: Farm) -> None:
    farm.write("fragile_setup.py", SETUP)
    master = farm.master("--tasks", "-", "--results", "results.jsonl", "--timeout", 20, stdin=subprocess.PIPE)
    workers = [farm.worker(master, "--function", "fragile_setup:run") for _ in range(2)]
    master.wait_line("worker .* connected", count=2)
    master.give(range(100))
    assert master.wait() == 1
    assert [worker.wait() for worker in workers] == [0, 0], "also the one that still loads hears that the job is over"
    assert [record["id"] for record in farm.in_order() if "error" in record] == [5]


def test_a_module_may_replace_standard_output_by_something_that_can_only_be_written(farm: Farm) -> None:
    logger = "sys.stdout = types.SimpleNamespace(write=len, flush=int)"
    farm.write("mod.py", f"import os, sys, types\n{logger}\ndef run(task):\n    return os.getpid()\n")
    worker = farm.run_job("--function", "mod:run", *range(20))
    assert len({record["result"] for record in farm.records()}) == 1
    assert not worker.said("Traceback")


def test_standard_input_is_empty_for_a_task(farm: Farm) -> None:
    tasks = farm.write_tasks([*NAMES["READING"]])
    master = farm.master("--tasks", tasks, "--results", "results.jsonl", "--timeout", 10)
    farm.worker(master, "--function", "mod:run", stdin=subprocess.PIPE)  # which stays open and silent
    assert master.wait() == 0, farm.records()
    assert {record["task"]: record["result"] for record in farm.records()} == dict(zip(NAMES["READING"], ["", 0, ""]))


def test_a_result_nested_as_deeply_as_json_allows_is_printed_recorded_and_kept(farm: Farm) -> None:
    farm.write("deep.py", "def nest(n):\n    x = 1\n    for _ in range(n):\n        x = [x]\n    return x\n")
    farm.write_tasks(range(900, 1010, 2))
    what = ("--tasks", "tasks.jsonl", "--workers", 1, "--function", "deep:nest")
    printed, recorded = farm.master(*what), farm.master(*what, "--results", "results.jsonl")
    printed.wait()
    recorded.wait()
    results = [line for line in printed.stdout if line.startswith("Result: [[")]
    assert printed.said(rf"\b{len(results)} done, {55 - len(results)} failed"), "a task without a result has failed"
    before = farm.results.read_text()
    good = before.count('"result": ')
    resumed = farm.master(*what, "--results", "results.jsonl", "--resume")
    resumed.wait()
    after = farm.results.read_text()
    assert (before.count("\n"), after.count("\n"), after.count('"result": ')) == (55, 55, good)
    assert resumed.said(rf"\b{good} done, .*, {good} kept from before"), "none of those that succeeded runs again"
    check_silence(printed, recorded, resumed)

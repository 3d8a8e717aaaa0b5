"""However a task, a worker or a master ends, all that it started ends, too.

LEFTOVERS_ENDS=200 in the environment makes two hundred random ends; the seed of each is its number.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Callable

import psutil
import pytest
from lab import ANOTHER_USER, ROOT, Farm, Program, needs_setpriv, wait_until

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="looks into /proc")

ENDS = int(os.environ.get("LEFTOVERS_ENDS", "3"))
PATIENCE = 30.0  # seconds for everything to be gone; less than what is left would last by itself


def each_left(mark: str) -> Iterator[tuple[int, str]]:
    """What runs with the mark in its environment, as it is found: the process, and its KIND or else its command line."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            thread = f"/proc/{entry}/task/{os.listdir(f'/proc/{entry}/task')[-1]}"  # of a headless one only the others have these
            with open(f"{thread}/environ", "rb") as environ, open(f"{thread}/cmdline", "rb") as command:
                variables = environ.read().decode("utf-8", "replace").split("\0")
                if f"LEFTOVERS={mark}" in variables:
                    kinds = [variable[5:] for variable in variables if variable.startswith("KIND=")]
                    yield int(entry), (kinds or [command.read().decode("utf-8", "replace").replace("\0", " ")])[0]
        except OSError:  # it has ended
            continue


def find_left(mark: str) -> list[str]:
    """The kinds of all that runs with the mark; several looks, since what goes from process to process hides from some."""
    return sorted(dict(left for _ in range(5) for left in each_left(mark)).values())


FUNCTIONS = '''
from __future__ import annotations
import ctypes, json, os, signal, subprocess, sys, time

CHAIN = """
import os, time
os.setsid()
for _ in range(180):  # goes from process to process, for a minute and a half
    time.sleep(0.5)
    if os.fork():
        os._exit(0)
"""
HEADLESS = """
import ctypes, os, threading, time
os.setsid()
threading.Thread(target=time.sleep, args=(90,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""
KINDS = {
    "group": ["sleep", "421"],
    "own-group": ["timeout", "300", "sleep", "421"],
    "session": ["setsid", "sleep", "421"],
    "deaf": ["sh", "-c", "trap '' HUP INT TERM; sleep 421; sleep 421"],
    "orphan": ["sh", "-c", "sleep 421 & exec sleep 0"],
    "daemon": ["sh", "-c", "setsid sh -c 'sleep 421 & sleep 421' & exec sleep 0"],
    "stopped": ["sh", "-c", "kill -STOP $$; sleep 421"],
    "chain": [sys.executable, "-c", CHAIN],
    "headless": [sys.executable, "-c", HEADLESS],
}

def spread(task):
    """Starts a process of each kind, says which of them were there before, and then does what the task says."""
    before = [kind for kind in find_left(os.environ["LEFTOVERS"]) if kind in KINDS]
    null = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for kind, command in KINDS.items():
        subprocess.Popen(command, env={**os.environ, "KIND": kind}, start_new_session=kind == "stopped", **null)
    print("spread", json.dumps(before), flush=True)
    if task == "exit":
        os._exit(3)
    if task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "crash":
        ctypes.string_at(0)
    if task == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if task == "hold":  # C code that waits for ever and lets no other thread run
        mutex, libc = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    while task == "stay" and not os.path.exists("go"):
        time.sleep(0.01)
    open("finished", "w").close()
    return task

'''


class Scene:
    """A farm whose processes, and all that they start, bear a mark."""

    def __init__(self, farm: Farm) -> None:
        self.farm, self.mark = farm, secrets.token_hex(8)
        (farm.folder / "leave.py").write_text(FUNCTIONS + inspect.getsource(each_left) + inspect.getsource(find_left))
        (farm.folder / "tmp").mkdir()
        farm.env = functools.partial(farm.env, LEFTOVERS=self.mark, TMPDIR=str(farm.folder / "tmp"))  # type: ignore[method-assign]

    def master(self, *argv: object, **options: Any) -> Program:
        return self.farm.master("--results", "results.jsonl", *argv, **options)

    def worker(self, master: Program, *argv: object, **options: Any) -> Program:
        return self.farm.worker(master, "--function", "leave:spread", *argv, **options)

    def wait_none_left(self) -> None:
        wait_until(lambda: not find_left(self.mark), patience=PATIENCE)

    def close(self) -> None:
        while find_left(self.mark):
            for pid, _ in each_left(self.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def scene(farm: Farm) -> Iterator[Scene]:
    with contextlib.closing(Scene(farm)) as scene:
        yield scene


def wait_spread(program: Program, count: int = 1) -> list[str]:
    """Block until tasks have spread `count` times; returns what was there before the last one did."""
    stream = "stdout" if "task_worker.py" in " ".join(program.process.args) else "stderr"  # there a master passes it on
    return [*json.loads(program.wait_line("^spread (.*)", stream, count).group(1))]


def test_what_a_task_has_started_is_gone_before_the_next_one_begins(scene: Scene) -> None:
    tasks = {"exit": "ProcessDied", "kill": "ProcessDied", "crash": "ProcessDied"}
    tasks |= {"stay": "TimeoutError", "hold": "TimeoutError", "stop": "TimeoutError"}
    master = scene.master("--tasks", scene.farm.write_tasks([*tasks, "return"]), "--timeout", 8)
    worker = scene.worker(master)
    assert (master.wait(), worker.wait()) == (1, 0)
    assert [wait_spread(worker, n) for n in range(1, 8)] == [[]] * 7
    assert [record["error"]["type"] for record in scene.farm.in_order()[:6]] == [*tasks.values()]
    scene.wait_none_left()


def test_a_worker_that_waits_for_the_next_job_takes_along_what_the_last_one_has_started(scene: Scene) -> None:
    master = scene.master('"first"')
    worker = scene.worker(master, "--wait", 0)
    assert master.wait() == 0
    worker.wait_line("the job is over")
    again = scene.farm.run("task_master.py", "--port", master.port(), '"second"')
    assert wait_spread(worker, 2) == []
    assert again.wait() == 0
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    scene.wait_none_left()


COMMANDS = """
echo {}; case {} in
    0) sleep 421 & ;;
    1) sleep 421 >/dev/null 2>&1 & ;;
    2) nohup sleep 421 & ;;
    3) setsid sleep 421 & ;;
    4) (trap '' HUP TERM; sleep 421; sleep 421) & exit 0 ;;
    5) setsid sleep 421 & (sleep 421; echo) | cat & (sleep 421 & wait) & timeout 300 sleep 421 ;;
esac
"""


def test_a_command_is_over_when_its_shell_is_or_when_its_time_is_and_nothing_is_left(scene: Scene) -> None:
    scene.farm.run_job(*range(6), "--timeout", 8, "--command", COMMANDS, status=1)
    *good, late = scene.farm.in_order()
    assert [(record["result"]["exit"], record["result"]["stdout"]) for record in good] == [(0, f"{n}\n") for n in range(5)]
    assert late["error"]["type"] == "TimeoutError" and "8 s" in late["error"]["message"]
    scene.wait_none_left()


SHARED = """
import os
from multiprocessing import shared_memory

def leave(way):
    parts = [shared_memory.SharedMemory(create=True, size=10) for _ in range(300)]
    with open("names", "a") as file:
        file.writelines([f"{part.name.strip('/')}\\n" for part in parts])
    if way == "die":
        os._exit(1)
    while way == "hang":
        pass
"""


@pytest.mark.skipif(not os.path.exists("/dev/shm"), reason="shared memory has no files here")
def test_no_shared_memory_is_left_that_a_killed_task_has_made(farm: Farm) -> None:
    farm.write("shared.py", SHARED)
    farm.run_job("--tasks", farm.write_tasks(["die", "hang"]), "--timeout", 8, function="shared:leave", status=1)
    names = (farm.folder / "names").read_text().split()
    assert len(names) == 600
    wait_until(lambda: not {*names} & {*os.listdir("/dev/shm")})


def test_a_process_is_replaced_at_once_whatever_a_command_has_left_in_the_background(farm: Farm) -> None:
    """It holds what the process has inherited."""
    farm.run_job('"a"', '"b"', "--tasks-per-process", 1, "--command", "(sleep 4; touch late) & : {}")
    assert not (farm.folder / "late").exists()


def test_a_task_is_recorded_before_its_process_has_ended(farm: Farm) -> None:
    code = "import functions, os, threading\n\ndef work(n):\n    threading.Thread(target=functions.stay, args=[n]).start()\n"
    farm.write("slow.py", code + "    return os.getpid()\n")
    master = farm.master("1", "2", "--results", "results.jsonl")
    worker = farm.worker(master, "--tasks-per-process", 1, "--function", "slow:work")
    farm.wait_records(worker, 1)
    assert psutil.pid_exists(farm.records()[0]["result"])
    farm.let_go()
    assert master.wait() == 0


@needs_setpriv
def test_what_hides_its_environment_is_gone_with_the_worker(scene: Scene) -> None:
    """As ssh-agent does: then only its descent shows whose it is."""
    hidden = "import ctypes, time; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); print(flush=True); time.sleep(421)"  # PR_SET_DUMPABLE
    command = f"setsid {sys.executable} -c '{hidden}' >ready & until [ -s ready ]; do sleep 0.02; done; : {{}}"
    master = scene.master('"a"')
    argv = [sys.executable, str(ROOT / "task_worker.py"), "--port", str(master.port()), "--processes", "1", "--command", command]
    worker = scene.farm.start([*ANOTHER_USER, *argv])
    assert (master.wait(), worker.wait()) == (0, 0), worker.stderr
    scene.wait_none_left()


def leave_twice(program: Program, number: int = signal.SIGINT) -> None:
    """Two signals, the second after the first has been heard."""
    program.drain(number)
    program.signal(number)
    assert program.wait() == 128 + number


WORKER_ENDS: dict[str, Callable[[Program, psutil.Process], object]] = {
    "killed": lambda worker, proper: worker.kill(),
    "worker proper killed": lambda worker, proper: proper.kill(),
    "group killed": lambda worker, proper: os.killpg(worker.pid, signal.SIGKILL),
    "second signal": lambda worker, proper: leave_twice(worker),
}


@pytest.mark.parametrize("task", ["stay", "hold"])
@pytest.mark.parametrize("end", WORKER_ENDS)
def test_nothing_is_left_of_a_worker_whose_task_runs(scene: Scene, end: str, task: str) -> None:
    master = scene.master(json.dumps(task))
    worker = scene.worker(master)
    wait_spread(worker)
    WORKER_ENDS[end](worker, min(psutil.Process(worker.pid).children(), key=psutil.Process.create_time))
    leave_twice(master)
    scene.wait_none_left()


ELSEWHERE = """
import importlib.util, multiprocessing.popen_spawn_posix, multiprocessing.resource_tracker, socket, subprocess, sys, tempfile
sys.platform = "darwin"  # which has no /proc; what Python itself looks up by this name was imported before
"""


@pytest.mark.parametrize("end", ["killed", "second signal"])
def test_the_command_of_a_worker_ends_with_it_where_there_is_no_proc(scene: Scene, end: str) -> None:
    scene.farm.write("sitecustomize.py", ELSEWHERE)
    master = scene.master("1")
    env = scene.farm.env(PYTHONPATH=str(scene.farm.folder))
    worker = scene.farm.worker(master, "--command", "touch began; sleep 421; : {}", env=env)
    wait_until((scene.farm.folder / "began").exists, worker)
    WORKER_ENDS[end](worker, psutil.Process(worker.pid))
    leave_twice(master)
    scene.wait_none_left()


@pytest.mark.parametrize("task", ["stay", "hold"])
@pytest.mark.parametrize("end", [Program.kill, leave_twice])
def test_nothing_is_left_of_a_master_whose_local_worker_runs_a_task(scene: Scene, end: Callable[..., None], task: str) -> None:
    master = scene.master(json.dumps(task), "--workers", 2, "--function", "leave:spread")
    wait_spread(master)
    end(master)
    scene.wait_none_left()
    assert not (scene.farm.folder / "finished").exists()


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
def test_neither_a_process_nor_a_file_is_left_of_a_job(scene: Scene, local: bool) -> None:
    options = ("--workers", 2, "--function", "leave:spread") if local else ()
    master = scene.master('"first"', '"second"', '"third"', *options)
    worker = master if local else scene.worker(master, "--processes", 2)
    assert (master.wait(), worker.wait()) == (0, 0)
    scene.wait_none_left()
    assert os.listdir(scene.farm.folder / "tmp") == []


def test_a_remote_worker_whose_master_was_killed_finishes_what_runs_and_leaves(scene: Scene) -> None:
    master = scene.master('"stay"')
    worker = scene.worker(master, "--wait", 1, "--processes", 2)
    wait_spread(worker)
    master.kill()
    worker.pause(4)  # the other process has nothing to do, and has looked for the master for long enough
    assert not (scene.farm.folder / "finished").exists()
    (scene.farm.folder / "go").touch()
    assert worker.wait() == 3
    assert (scene.farm.folder / "finished").exists()
    worker.wait_line("lost the master|cannot reach the master")
    scene.wait_none_left()


def act_at_random(dice: random.Random, scene: Scene, numbers: list[int]) -> int:
    """Send one of the signals to any process of the product; returns which."""
    ours, number = [pid for pid, kind in each_left(scene.mark) if " " in kind], dice.choice(numbers)  # these are command lines
    with contextlib.suppress(IndexError, ProcessLookupError):
        os.kill(dice.choice(ours), number)
    return number


@pytest.mark.parametrize("seed", range(ENDS))
def test_random_ends_leave_nothing(scene: Scene, seed: int) -> None:
    """One kill at most: nobody can clean up after a worker whose processes are all killed at the same time."""
    dice, numbers = random.Random(seed), [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGKILL]
    scene.farm.write_tasks([dice.choice(["return", "stay", "hold", "stop", "exit", "kill"]) for _ in range(6)])
    options = ("--timeout", 3, "--retries", 1, "--workers", dice.choice([1, 2]), "--function", "leave:spread")
    master = scene.master("--tasks", "tasks.jsonl", *options)
    worker = scene.worker(master, "--wait", 1, "--processes", dice.choice([1, 2]))
    if dice.random() < 0.7:  # else it has just begun
        wait_spread(master)
    for _ in range(dice.randrange(3)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(dice.uniform(0.0, 2.0))
        if act_at_random(dice, scene, numbers) == signal.SIGKILL:
            numbers = numbers[:3]
    kills = [[signal.SIGKILL]] if len(numbers) > 3 else []
    for program in dice.sample([master, worker], 2):
        for number in dice.choice([*kills, [signal.SIGTERM, signal.SIGINT], [signal.SIGHUP, signal.SIGTERM]]):
            program.signal(number)
    scene.wait_none_left()


def test_the_harness_sees_what_is_left(scene: Scene) -> None:
    """Each kind of process, when it is started without the product."""
    code = "import leave, sys; leave.spread('return')"
    program = scene.farm.run("-c", code, env=scene.farm.env(PYTHONPATH=str(scene.farm.folder)))
    assert program.wait() == 0
    kinds = "chain daemon deaf group headless orphan own-group session stopped".split()
    assert set(find_left(scene.mark)) == set(kinds)

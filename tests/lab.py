"""What several test files need: the real programs in a farm of their own, the wire by hand, relays, hosts, the README.

It needs a POSIX system, and so do the tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import AuthenticationError, connection
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from task_worker import PROTOCOL

ROOT = Path(__file__).resolve().parent.parent
RIGHTS = [f"--{kind}=-all,+dac_override" for kind in ("inh-caps", "ambient-caps", "bounding-set")]  # to read what root has
ANOTHER_USER = ["setpriv", f"--reuid={50_000 + os.getpid() % 10_000}", "--clear-groups", *RIGHTS]  # who has nothing else
needs_setpriv = pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="needs setpriv, and root")
PATIENCE = 150.0  # seconds after which a line or an end that is waited for counts as missing; generous, the machine is noisy
MEGABYTE = 1 << 20
Result = TypeVar("Result")

FUNCTIONS = '''
"""What the tests let the workers run; in the folder of every farm, as functions.py."""
import os, signal, time

def note(task):
    """Note in started.log that a task was started, in one write."""
    descriptor = os.open("started.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{task}\\n".encode())
    os.close(descriptor)

def same(task):
    return task

def double(n):
    return 2 * n

def mendable(n):
    """Fails for a number that ends in 7, unless there is a file `mended`."""
    note(n)
    if n % 10 == 7 and not os.path.exists("mended"):
        raise ValueError(n)
    return 2 * n

def fail(task):
    raise ValueError(f"no {task} today")

def work(n):
    note(n)
    time.sleep(n * 7919 % 10 / 1000)  # 4.5 ms on average
    return 2 * n

def kill_worker(task):
    if task == "guilty":
        note(task)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    return task

def nap(seconds):
    note(seconds)
    time.sleep(seconds)
    return seconds

def stay(task):
    """Says that it runs, and does until there is a file `go`."""
    note(task)
    print("it runs", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.01)
    return task
'''


# What a reader of the tutorial writes, and runs as `client.py PORT KEY`.
PLAIN_CLIENT = """
import math, queue, sys
from multiprocessing.managers import BaseManager

class QueueManager(BaseManager):
    pass

QueueManager.register("get_task_queue")
QueueManager.register("get_result_queue")
manager = QueueManager(address=("127.0.0.1", int(sys.argv[1])), authkey=sys.argv[2].encode())
manager.connect()
tasks, results = manager.get_task_queue(), manager.get_result_queue()
"""


# ---- programs ------------------------------------------------------------------------------------------------------


class Program:
    """A running task_master or task_worker, or any other, its output read line by line as it comes."""

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str], **options: Any) -> None:
        self.process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=options.pop("stdin", subprocess.DEVNULL), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, **options,
        )  # fmt: skip
        self.pid = self.process.pid
        self.stdout: list[str] = []  # the lines on standard output so far
        self.stderr: list[str] = []  # the lines on standard error so far
        self.lines = {"stdout": self.stdout, "stderr": self.stderr}
        streams = [(self.process.stdout, self.stdout), (self.process.stderr, self.stderr)]
        self._readers = [threading.Thread(target=self._read, args=ends, daemon=True) for ends in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line.decode("utf-8", "replace").rstrip("\n"))

    def name(self) -> str:
        """What this worker is called in records and messages."""
        return f"{socket.gethostname()}/{self.pid}"

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def children(self) -> list[psutil.Process]:
        """The processes of this worker that run the function."""
        found = []
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def said(self, pattern: str) -> list[str]:
        """The lines on standard error so far that match."""
        return [line for line in self.stderr if re.search(pattern, line)]

    def is_running(self) -> bool:
        return self.process.poll() is None

    def is_over(self) -> bool:
        """Whether it has ended, and all that it wrote is read."""
        return not self.is_running() and not any(reader.is_alive() for reader in self._readers)

    def wait_line(self, pattern: str, name: str = "stderr", count: int = 1, timeout: float = PATIENCE) -> re.Match[str]:
        """Block until `count` lines of a stream match; returns the last of these matches. Fails with all the output."""

        def find_line() -> re.Match[str] | None:
            matches = [match for line in list(self.lines[name]) if (match := re.search(pattern, line))]
            return matches[count - 1] if len(matches) >= count else None

        return wait_until(find_line, self, patience=timeout)

    def port(self) -> int:
        """The port that the master listens on; blocks until it does."""
        return int(self.wait_line(r"listening on .*:(\d+)$").group(1))

    def wait(self, timeout: float = PATIENCE) -> int:
        """Block until the program has ended and its output is read; returns the exit status."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s; got {json.dumps(self.lines, indent=1)}")
        for reader in self._readers:
            reader.join(5)  # a process that it left behind may keep the pipe open
        return status

    def pause(self, seconds: float) -> None:
        """Let time pass while it runs; fails when it ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"it ended with {self.process.wait(seconds)}: {self.lines}")

    def put(self, text: str) -> None:
        """Write to its standard input, which is a pipe."""
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def give(self, lines: Iterable[object]) -> None:
        """Write lines to its standard input, and end it."""
        self.put("".join(f"{line}\n" for line in lines))
        self.end_input()

    def end_input(self) -> None:
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def drain(self, number: int = signal.SIGTERM) -> None:
        """Send it its first signal, and block until it says that it drains."""
        self.signal(number)
        self.wait_line("^task_(master|worker): draining")
        time.sleep(0.01)  # the same signal within 5 ms would count as this one

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def suspend(self) -> None:
        """SIGSTOP, for the process and all that it has started."""
        for process in [psutil.Process(self.pid), *self.descendants()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """SIGCONT, for the process and all that it has started."""
        for process in [self.process, *self.descendants()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, for the process alone."""
        self.process.kill()
        self.process.wait()


class Farm:
    """Makes masters and workers that know the same key, in `folder`, where functions.py is, and the test file's mod.py."""

    def __init__(self, folder: Path, module: str = "") -> None:
        self.folder = folder
        self.tls: list[str] = []
        self.python = sys.executable
        self.results = folder / "results.jsonl"
        self.key = secrets.token_hex(16)
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.programs: list[Program] = []
        self._things = contextlib.ExitStack()
        self.write("functions.py", FUNCTIONS)
        if module:
            self.write("mod.py", module)

    def use_tls(self) -> Farm:
        """From now on all programs use TLS; skips the test when no Python here can."""
        self.tls, self.python = ["--tls"], tls_python()
        return self

    def env(self, **more: str | None) -> dict[str, str]:
        """The environment of the programs, with the key and an empty home; what is None is left out."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TASK_", "PYTHON"))}
        env = {**inherited, "HOME": str(self.home), "TASK_AUTHKEY": self.key, **more}
        return {name: value for name, value in env.items() if value is not None}

    def start(self, command: list[str], env: dict[str, str] | None = None, **options: Any) -> Program:
        """Start any command, in the folder and with the environment unless told otherwise."""
        options.setdefault("cwd", self.folder)
        self.programs.append(Program(command, env=self.env() if env is None else env, **options))
        return self.programs[-1]

    def run(self, *argv: object, python: str | None = None, **options: Any) -> Program:
        """Start any program of this repository: `run("task_master.py", "--port", 0)`."""
        path = ROOT / str(argv[0]) if (ROOT / str(argv[0])).exists() else argv[0]
        return self.start([python or self.python, str(path), *map(str, argv[1:])], **options)

    def run_after(self, preparation: str, *argv: object, **options: Any) -> Program:
        """Start a program of this repository in a process that has done something before."""
        code = f"import fcntl, os, resource, signal, sys, termios\n{preparation}\n"
        code += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        return self.run("-c", code, ROOT / str(argv[0]), *argv[1:], **options)

    def master(self, *argv: object, **options: Any) -> Program:
        """Start a master on a free port."""
        return self.run("task_master.py", "--port", 0, *self.tls, *argv, **options)

    def altered_master(self, code: str, *argv: object) -> Program:
        """Start a master in whose own process some code has run before."""
        code = f"import errno, fcntl, os, task_master\n{code}\nraise SystemExit(task_master.main())"
        return self.run("-c", code, "--port", 0, *argv, env=self.env(PYTHONPATH=str(ROOT)))

    def worker(self, master: Program | int, *argv: object, **options: Any) -> Program:
        """Start a worker for a master, or for a port, with one process unless told otherwise."""
        port = master if isinstance(master, int) else master.port()
        processes = [] if "--processes" in argv else ["--processes", 1]
        return self.run("task_worker.py", "--port", port, *self.tls, *processes, *argv, **options)

    def run_master(self, *argv: object, status: int = 0, **options: Any) -> Program:
        """A master, run to its end."""
        master = self.master(*argv, **options)
        assert master.wait() == status, master.stderr
        return master

    def run_job(self, *argv: object, function: str = "", **options: Any) -> Program:
        """A job of a local worker into results.jsonl, run to its end."""
        what = ("--function", function) if function else ()
        return self.run_master("--results", "results.jsonl", "--workers", 1, *what, *argv, **options)

    def peer(self, master: Program, name: str = "host/1") -> Peer:
        """A slot by hand, connected to a master; closed with the farm."""
        return self.closing(Peer(self, master.port(), name))

    def closing(self, thing: Any) -> Any:
        """Have something closed with the farm."""
        self._things.callback(thing.close)
        return thing

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def write_tasks(self, tasks: Iterable[Any], name: str = "tasks.jsonl") -> Path:
        return self.write(name, "".join(json.dumps(task) + "\n" for task in tasks))

    def records(self, name: str = "results.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def in_order(self, name: str = "results.jsonl") -> list[dict[str, Any]]:
        """The records in the order of the tasks."""
        return sorted(self.records(name), key=lambda record: record["id"])

    def values(self) -> list[Any]:
        """The results in the order of the tasks; None for a task that failed."""
        return [record.get("result") for record in self.in_order()]

    def wait_records(self, program: Program, count: int) -> None:
        """Block until so many lines are in results.jsonl; `program` is what must not end before that."""
        wait_until(lambda: self.results.exists() and self.results.read_bytes().count(b"\n") >= count, program)

    def started(self) -> list[str]:
        """The tasks that were noted in started.log, in this order."""
        path = self.folder / "started.log"
        return path.read_text().split() if path.exists() else []

    def wait_started(self, program: Program, task: object = None) -> None:
        """Block until a task has been noted, or any at all; `program` is what must not end before that."""
        wait_until(lambda: self.started() if task is None else str(task) in self.started(), program)

    def mend(self) -> None:
        """From now on the function `mendable` fails for no task."""
        (self.folder / "mended").touch()

    def let_go(self) -> None:
        """Let the tasks that wait for the file `go` end."""
        (self.folder / "go").touch()

    def check_once(self, count: int, name: str = "results.jsonl") -> None:
        check_once(self.records(name), count)

    def check_doubled(self, count: int) -> None:
        """Each of so many tasks, which are their ids, has one record, and the result of `double`."""
        self.check_once(count)
        assert all(record["task"] == record["id"] and record["result"] == 2 * record["id"] for record in self.records())

    def make_patched(self, **constants: object) -> Path:
        """A folder with copies of both files in which some constants have other values."""
        folder = self.folder / "patched"
        folder.mkdir()
        replaced = 0
        for name in ("task_master.py", "task_worker.py"):
            text = (ROOT / name).read_text()
            for constant, value in constants.items():
                text, count = re.subn(rf"^{constant} = \S+", f"{constant} = {value}", text, flags=re.MULTILINE)
                replaced += count
            (folder / name).write_text(text)
        assert replaced >= len(constants)
        return folder

    def false_master(self, reply: Callable[[str, list[str]], bytes]) -> FalseServer:
        """A `false_master` that is served, and closed with the farm."""
        return self.closing(FalseServer(false_master(self, reply)))

    def close(self) -> None:
        for program in self.programs:
            program.resume()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)  # a worker's children see that it is gone, and end, too
            program.wait()
            program.end_input()
        self._things.close()


def wait_until(condition: Callable[[], Result | None], *programs: Program, patience: float = PATIENCE) -> Result:
    """Block until a condition is true, and return what it gave. Fails when one of these programs ends instead."""
    give_up_at = time.monotonic() + patience
    while True:
        over = any(program.is_over() for program in programs)
        if result := condition():
            return result
        if over or time.monotonic() > give_up_at:
            pytest.fail(f"waited in vain for {condition}; got {[program.lines for program in programs]}")
        time.sleep(0.02)


def check_once(records: list[dict[str, Any]], count: int) -> None:
    """Each of so many tasks has one record."""
    assert sorted(record["id"] for record in records) == list(range(count))


def check_silence(*programs: Program) -> None:
    """No traceback on anybody's standard error, and nothing that would command a terminal."""
    for program in programs:
        assert not program.said("Traceback|internal error|\x1b"), program.stderr


def check_said(program: Program, status: int, *patterns: str) -> str:
    """It ends with this status and without a traceback; the only line on standard error that has all of these."""
    assert program.wait() == status, program.stderr
    check_silence(program)
    lines = [line for line in program.stderr if all(re.search(pattern, line, re.IGNORECASE) for pattern in patterns)]
    assert len(lines) == 1, (patterns, program.stderr)
    return lines[0]


def check_one_line(program: Program, status: int, *patterns: str) -> None:
    """It ends with this status, and the one line that it says, the usage aside, names the program and has all of these."""
    line = check_said(program, status, *patterns)
    assert [other for other in program.stderr if not other.startswith(("usage: ", " "))] == [line], program.stderr
    assert re.match("task_(master|worker): ", line) and len(line) < 400, line


# ---- processes -----------------------------------------------------------------------------------------------------


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that was killed and waits for the system to take notice does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def check_ended(processes: list[psutil.Process]) -> None:
    """Block until all of these, of which there are some, have ended."""
    assert processes
    wait_until(lambda: not [process for process in processes if is_alive(process)])


def peak_memory(pid: int) -> int:
    """The most bytes of memory that a process has had so far."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


# ---- the README ----------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:<!-- test: (?P<name>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
# By the name in the comment before the block or in its first line, else by that line; there is one unit for systemd
BLOCKS = {
    match["name"] or ("service" if match["language"] == "ini" else match["text"].split("\n")[0].removeprefix("# ")): match["text"]
    for match in BLOCK.finditer(README)
}


def find_block(start: str) -> str:
    """The block with this name, or the one whose first line begins so."""
    found = [text for key, text in BLOCKS.items() if key == start or (start not in BLOCKS and key.startswith(start))]
    assert len(found) == 1, f"{len(found)} blocks for {start!r} in the README"
    return found[0]


# ---- Pythons -------------------------------------------------------------------------------------------------------


@functools.lru_cache
def find_pythons() -> dict[str, str]:
    """Version and executable of each Python from 3.9 on that is on PATH or under PYENV_ROOT; the running one first."""
    found = [shutil.which(f"python3.{minor}") for minor in range(9, 20)]
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [sys.executable, *filter(None, found), *sorted(map(str, root.glob("versions/3.*/bin/python3")))]
    pythons: dict[str, str] = {}
    for candidate in candidates:
        code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        version, _, executable = answer.stdout.strip().partition(" ")
        if answer.returncode == 0 and tuple(map(int, version.split("."))) >= (3, 9):
            pythons.setdefault(version, executable)
    return pythons


def has_psk(python: str) -> bool:
    """Whether it can do TLS with a pre-shared key."""
    return subprocess.run([python, "-c", "import ssl; ssl.HAS_PSK or exit(1)"], capture_output=True, check=False).returncode == 0


@functools.lru_cache
def tls_python() -> str:
    """A Python with TLS-PSK; skips the test when there is none."""
    for python in filter(has_psk, find_pythons().values()):
        return python
    pytest.skip("no Python 3.13 or newer here: TLS with a pre-shared key needs one")


# ---- the wire by hand: all that knows how a client and a worker speak ------------------------------------------------

TASKS, RESULTS = "get_task_queue", "get_result_queue"
WELCOME, JOIN, LEASE, RELEASE, REPORT, BEAT = "accept_connection", "join", "lease", "release", "report", "beat"
SETTINGS = {"protocol": PROTOCOL, "run": "r", "timeout": None, "refused": None}


def make_outcome(value: str, kind: str = "result", seconds: str = "0.5") -> str:
    """What came of a task, as a worker sends it: members of a record. `value` is JSON, or had better be."""
    return f'"{kind}": {value}, "started_at": 1.250, "seconds": {seconds}'


GOOD = make_outcome("1")


def ok(task_id: int, result: object) -> str:
    """An outcome for `Peer.report`."""
    return f"{task_id} {make_outcome(json.dumps(result))}"


def join_outcomes(*outcomes: str) -> str:
    """Outcomes, each as `ID MEMBERS`, as they are reported: a line of ids, then a line of members for each."""
    ids, _, members = zip(*[outcome.partition(" ") for outcome in outcomes])
    return "\n".join([" ".join(ids), *members])


def connect(farm: Farm, port: int) -> Any:
    """A client of the standard library that has shown that it knows the key, and has said nothing yet."""
    return connection.Client(("127.0.0.1", port), authkey=farm.key.encode())


class Peer:
    """A slot driven by hand, with nothing but the standard library's client."""

    def __init__(self, farm: Farm, port: int, name: str = "host/1") -> None:
        self.connection = connect(farm, port)
        self.connection.send((None, WELCOME, (name,), {}))
        assert self.connection.recv()[0] == "#RETURN"

    def ask(self, queue: Any, method: Any, *args: object) -> None:
        """Send a call, and do not wait for what it returns."""
        self.connection.send((queue, method, args, {}))

    def call(self, queue: str, method: str, *args: object) -> Any:
        self.ask(queue, method, *args)
        kind, value = self.connection.recv()
        assert kind == "#RETURN", value
        return value

    def try_call(self, queue: Any, method: Any, *args: object) -> str:
        """Call whatever it is; returns how the master answered, "" when it closed the connection instead."""
        try:
            self.ask(queue, method, *args)
            if not self.connection.poll(PATIENCE):
                pytest.fail(f"no answer to {method}{args!r:.200}")
            data = self.connection.recv_bytes()
        except (EOFError, OSError):
            return ""
        return next((kind for kind in ("#RETURN", "#ERROR", "#TRACEBACK") if kind.encode() in data[:40]), "")

    def join(self, *statement: str) -> Peer:
        """Become a slot, of a worker that states this about itself."""
        self.run_id = str(self.call(TASKS, JOIN, PROTOCOL, *statement)["run"])
        return self

    def lease(self, limit: int = 1, wait: float = 20.0) -> list[str]:
        """Tasks, each as `ID TEXT`; [] when there is none in time."""
        lease = self.call(TASKS, LEASE, limit, wait)
        return lease.split("\n") if lease else []

    def lease_ids(self, limit: int = 1, wait: float = 20.0) -> list[int]:
        return [int(line.split()[0]) for line in self.lease(limit, wait)]

    def qsize(self) -> int:
        return int(self.call(TASKS, "qsize"))

    def report(self, *outcomes: str) -> None:
        """Report outcomes, each as `ID MEMBERS`."""
        self.call(RESULTS, REPORT, self.run_id, 0.0, join_outcomes(*outcomes))

    def release(self, task_ids: list[int]) -> None:
        self.call(TASKS, RELEASE, " ".join(map(str, task_ids)))

    def close(self) -> None:
        self.connection.close()


def receive_call(peer: Any) -> tuple[str, list[str]]:
    """The method that a worker calls, and the arguments."""
    words, _, text = peer.recv_bytes().decode().partition("\n")
    _, method, *arguments = words.split(" ")
    return method, [*arguments, text]


def answer(value: Any, kind: str = "#RETURN") -> bytes:
    """What a master answers to a worker."""
    return f"{kind} text\n{value}".encode() if isinstance(value, str) else f"{kind} json\n{json.dumps(value)}".encode()


def good_answer(method: str) -> bytes:
    """What a master answers whose only task is 7."""
    return answer({JOIN: SETTINGS, LEASE: "0 7"}.get(method))


def frame(data: bytes) -> bytes:
    return struct.pack("!i", len(data)) + data


# ---- both ends of connections ----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def is_closed(sock: socket.socket, patience: float = PATIENCE) -> bool:
    """Whether the other end closes the connection in time; what it sends is thrown away."""
    give_up_at = time.monotonic() + patience
    while select.select([sock], [], [], max(0.0, give_up_at - time.monotonic()))[0]:
        try:
            if not sock.recv(1 << 16):
                return True
        except OSError:
            return True
    return False


class FalseServer(socketserver.ThreadingTCPServer):
    """Accepts connections, and does to each what `act` says, in a thread of its own."""

    request_queue_size = 100

    def __init__(self, act: Callable[[socket.socket], None]) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.port = int(self.server_address[1])
        self._act = act
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, args=[0.1], daemon=True).start()

    @property
    def served(self) -> int:
        """How many connections there have been."""
        return len(self._sockets)

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = super().get_request()
        self._sockets.append(sock)
        return sock, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        with contextlib.suppress(OSError, EOFError, AuthenticationError):
            self._act(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        raise  # the error in `act`, which pytest then tells

    def cut(self) -> None:
        """End all connections; wakes the threads that wait for them."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shutdown()
        self.cut()
        self.server_close()


def false_master(farm: Farm, reply: Callable[[str, list[str]], bytes]) -> Callable[[socket.socket], None]:
    """For a FalseServer: a master that knows the key, and replies to a method with its arguments as told.

    A reply that begins with RAW is written as it is, without a frame; EOFError instead of a reply ends the connection.
    """

    def act(sock: socket.socket) -> None:
        sock.settimeout(None)
        with connection.Connection(os.dup(sock.fileno())) as conn:
            connection.deliver_challenge(conn, farm.key.encode())
            connection.answer_challenge(conn, farm.key.encode())
            while True:
                data = reply(*receive_call(conn))
                if data.startswith(b"RAW"):
                    os.write(conn.fileno(), data[3:])
                else:
                    conn.send_bytes(data)

    return act


class Relay(FalseServer):
    """Passes on what comes to its port, until it is told to cut all connections; keeps a copy, and may change it."""

    def __init__(self, target: int, change: Callable[[bytes], bytes] = lambda data: data) -> None:
        super().__init__(self._pass_on)
        self.target = target
        self.seen = bytearray()
        self._change = change

    def _pass_on(self, near: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self.target)) as far, contextlib.suppress(ValueError):
            while True:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    self.seen += data
                    (far if source is near else near).sendall(self._change(data))


# ---- other hosts, reached through ssh --------------------------------------------------------------------------------

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
needs_sshd = pytest.mark.skipif(not SSHD or not shutil.which("ssh"), reason="no sshd here: install openssh-server")
SSHD_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
{more}
ForceCommand cd {home} && export HOME={home} TMPDIR={home}/tmp PATH={home}/bin:"$PATH" && exec {shell} -c "$SSH_ORIGINAL_COMMAND"
"""
SSH_CONFIG = """
Host *
    HostName 127.0.0.1
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""


class SshHost:
    """A "host" on this machine: an sshd with a port, keys and a home of its own. What runs there is told by its home."""

    def __init__(self, net: SshNet, name: str, shell: str, more: str, python: str | None) -> None:
        self.name, self.net, self.port = name, net, free_port()
        self.folder = net.folder / name
        self.home, self.tmp = self.folder / "home", self.folder / "home" / "tmp"
        for folder in (self.home / "bin", self.tmp):
            folder.mkdir(parents=True)
        if python:
            make_script(self.home / "bin" / "python3", f'exec {os.path.realpath(python)} "$@"')
        net.make_key(self.folder / "host_key")
        shutil.copy(net.folder / "user_key.pub", self.folder / "authorized_keys")
        text = SSHD_CONFIG.format(port=self.port, folder=self.folder, home=self.home, shell=shutil.which(shell), more=more)
        (self.folder / "config").write_text(text)
        self.start()

    def start(self) -> None:
        self.server = Program([str(SSHD), "-D", "-e", "-f", str(self.folder / "config")], self.folder, self.net.farm.env())
        self.server.wait_line("Server listening")

    def sessions(self) -> list[psutil.Process]:
        """The sshd processes of the connections."""
        found = []
        for process in self.server.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process] if process.name().startswith("sshd") else []
        return found

    def stop(self) -> None:
        """Switch it off, or cut its cable: sshd and its sessions end, but not what they have started."""
        for session in self.sessions():
            with contextlib.suppress(psutil.NoSuchProcess):
                session.kill()
        self.server.kill()
        self.server.wait()

    def processes(self) -> list[psutil.Process]:
        """What runs on the host, sshd aside."""
        processes = psutil.process_iter(["environ", "cmdline"])
        return [process for process in processes if (process.info["environ"] or {}).get("HOME") == str(self.home)]

    def leftovers(self) -> list[str]:
        """What should not be there when a worker has gone."""
        processes = [f"{process.pid} {process.info['cmdline']}" for process in self.processes()]
        return [*processes, *(path.name for path in self.tmp.iterdir())]

    def check_clean(self) -> None:
        """Block until no process and no folder is left there."""
        try:
            wait_until(lambda: not self.leftovers())
        except pytest.fail.Exception:
            pytest.fail(f"left on {self.name}: {self.leftovers()}")


class SshNet:
    """Hosts for the masters of a farm, which find them: `ssh` on PATH is OpenSSH's with a configuration of its own."""

    def __init__(self, farm: Farm, *options: str) -> None:
        """These options of ssh go before those of the master, so they count."""
        self.farm = farm
        self.folder, self.bin = farm.folder / "ssh", farm.folder / "bin"
        for made in (self.folder, self.bin):
            made.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # an empty folder that sshd wants, made by its service
        self.make_key(self.folder / "user_key")
        (self.folder / "known_hosts").touch()
        make_script(self.bin / "ssh", f'exec {shutil.which("ssh")} -F {self.folder}/config {" ".join(options)} "$@"')
        self._config = SSH_CONFIG.format(folder=self.folder)
        self.hosts: list[SshHost] = []
        farm.closing(self)

    def make_key(self, path: Path) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)

    def configure(self, name: str, *lines: str) -> None:
        """Add lines about a host to ssh's configuration."""
        self._config = "\n    ".join([f"Host {name}", *lines]) + "\n" + self._config
        (self.folder / "config").write_text(self._config)

    def host(self, name: str, shell: str = "sh", more: str = "", python: str | None = sys.executable) -> SshHost:
        """Start a host that knows our key, as we know its own; `python` is its python3, `more` goes into sshd_config."""
        host = SshHost(self, name, shell, more, python)
        self.hosts.append(host)
        self.configure(name, f"Port {host.port}", f"HostKeyAlias {name}")
        with open(self.folder / "known_hosts", "a") as file:
            file.write(f"{name} {(host.folder / 'host_key.pub').read_text()}")
        return host

    def master(self, *argv: object, **options: Any) -> Program:
        return self.farm.master(*argv, env=self.env(), **options)

    def env(self) -> dict[str, str]:
        return self.farm.env(PATH=f"{self.bin}{os.pathsep}{os.environ['PATH']}")

    def close(self) -> None:
        for host in self.hosts:
            host.stop()
            for process in host.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()


def make_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)

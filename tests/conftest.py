"""Starts the real programs: on port 0, with a random key, each in a folder of its own; kills what a test leaves behind."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds after which a line or an end that is waited for counts as missing; generous, the machine is noisy

FUNCTIONS = '''
"""What the tests let the workers run."""
import os, signal, sys, time

def double(n):
    return 2 * n

def nap(seconds):
    time.sleep(seconds)
    return seconds

def fail(task):
    raise ValueError(f"no {task} today")
'''


class Program:
    """A running task_master or task_worker, its output read line by line as it comes."""

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str], **options: Any) -> None:
        self.process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=options.pop("stdin", subprocess.DEVNULL), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, **options,
        )  # fmt: skip
        self.lines: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._arrived: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, args=(name, getattr(self.process, name)), daemon=True) for name in self.lines
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, stream: Any) -> None:
        with stream:
            for line in stream:
                self.lines[name].append(line.decode("utf-8", "replace").rstrip("\n"))
                self._arrived.put(None)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> list[str]:
        """The lines on standard output so far."""
        return self.lines["stdout"]

    @property
    def stderr(self) -> list[str]:
        """The lines on standard error so far."""
        return self.lines["stderr"]

    def wait_line(self, pattern: str, name: str = "stderr", count: int = 1, timeout: float = PATIENCE) -> re.Match[str]:
        """Block until `count` lines of a stream match; returns the last of these matches. Fails with all the output."""
        give_up_at = time.monotonic() + timeout
        while True:
            matches = [match for line in list(self.lines[name]) if (match := re.search(pattern, line))]
            if len(matches) >= count:
                return matches[count - 1]
            try:
                self._arrived.get(timeout=min(1.0, max(0.0, give_up_at - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= give_up_at or not any(reader.is_alive() for reader in self._readers):
                    pytest.fail(f"no line {count} like {pattern!r} on {name}; got {json.dumps(self.lines, indent=1)}")

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

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, for the process alone."""
        self.process.kill()
        self.process.wait()


class Farm:
    """Makes masters and workers that know the same key, in `folder`, where functions.py is."""

    def __init__(self, folder: Path, tls: bool = False) -> None:
        self.folder = folder
        self.tls = ["--tls"] if tls else []
        self.python = tls_python() if tls else sys.executable
        self.key = secrets.token_hex(16)
        self.home = folder / "home"
        self.home.mkdir()
        self.programs: list[Program] = []
        (folder / "functions.py").write_text(FUNCTIONS)

    def env(self, **more: str) -> dict[str, str]:
        """The environment of the programs, with the key and an empty home."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TASK_", "PYTHON"))}
        return {**inherited, "HOME": str(self.home), "TASK_AUTHKEY": self.key, **more}

    def run(self, *argv: object, python: str | None = None, env: dict[str, str] | None = None, **options: Any) -> Program:
        """Start any program of this repository: `run("task_master.py", "--port", 0)`."""
        path = ROOT / str(argv[0]) if (ROOT / str(argv[0])).exists() else argv[0]
        command = [python or self.python, str(path), *map(str, argv[1:])]
        options.setdefault("cwd", self.folder)
        program = Program(command, env=self.env() if env is None else env, **options)
        self.programs.append(program)
        return program

    def master(self, *argv: object, **options: Any) -> Program:
        """Start a master on a free port."""
        return self.run("task_master.py", "--port", 0, *self.tls, *argv, **options)

    def worker(self, master: Program, *argv: object, **options: Any) -> Program:
        """Start a worker for a master, with one process unless told otherwise."""
        processes = [] if "--processes" in argv else ["--processes", 1]
        return self.run("task_worker.py", "--port", master.port(), *self.tls, *processes, *argv, **options)

    def write_tasks(self, tasks: list[Any], name: str = "tasks.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
        return path

    def records(self, name: str = "results.jsonl") -> list[dict[str, Any]]:
        """The records in a results file."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def close(self) -> None:
        for program in self.programs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)  # a worker's children see that it is gone, and end, too
            program.wait()


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    """A farm without TLS, run by the Python of the tests."""
    farm = Farm(tmp_path)
    yield farm
    farm.close()


@pytest.fixture
def tls_farm(tmp_path: Path) -> Iterator[Farm]:
    """A farm with TLS, run by a Python that can do it."""
    farm = Farm(tmp_path, tls=True)
    yield farm
    farm.close()


@pytest.fixture(params=["plain", "tls"])
def any_farm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Farm]:
    """Once without TLS, once with it."""
    farm = Farm(tmp_path, tls=request.param == "tls")
    yield farm
    farm.close()


def find_pythons() -> list[str]:
    """Every Python from 3.9 on that is on PATH or under PYENV_ROOT, one of each minor version."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    folders += sorted(Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob("versions/*/bin"))
    found: dict[str, str] = {}
    for folder in folders:
        for path in folder.glob("python3.[0-9]*"):
            if re.fullmatch(r"python3\.\d+", path.name) and "shims" not in path.parts:
                found.setdefault(path.name, str(path))
    return [found[name] for name in sorted(found, key=lambda name: int(name[8:])) if int(name[8:]) >= 9]


@functools.lru_cache
def tls_python() -> str:
    """A Python with TLS-PSK; skips the test when there is none."""
    for python in [sys.executable, *find_pythons()]:
        if subprocess.run([python, "-c", "import ssl; ssl.HAS_PSK or exit(1)"], capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip("no Python 3.13 or newer here: TLS with a pre-shared key needs one")


def children_of(pid: int) -> list[int]:
    """The processes whose parent is `pid`, but for multiprocessing's own helper."""
    children = psutil.Process(pid).children()
    return [child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())]

"""The key is in no argument and no environment that a task sees; and a key file is a file of one's own, or one line."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
from lab import PATIENCE, Farm, without_key

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX's")

FUNCTIONS = """
import multiprocessing, os, subprocess

def look():
    seen = [f"{name}={value}" for name, value in os.environ.items()]
    seen.append(subprocess.run(["env"], stdout=subprocess.PIPE, check=True).stdout.decode())
    seen.append(repr(bytes(multiprocessing.current_process().authkey)))
    if os.path.exists("/proc/self/environ"):
        seen += [open(f"/proc/self/{name}", errors="replace").read() for name in ("environ", "cmdline")]
    return "\\n".join(seen)

with open("imported.log", "a") as file:
    file.write(look())

def spy(task):
    return look()
"""


@pytest.fixture
def farm(farm: Farm) -> Farm:
    farm.write("spies.py", FUNCTIONS)
    return farm


def write_key(farm: Farm, mode: int = 0o600) -> Path:
    path = farm.folder / "key"
    path.write_text(farm.key)
    path.chmod(mode)
    return path


# ---- what a task sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", [("--function", "spies:spy"), ("--command", "env; echo {} >/dev/null; tr '\\0' ' ' </proc/$$/cmdline")]
)
@pytest.mark.parametrize("source", ["environment", "file"])
@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
def test_no_task_sees_the_key(farm: Farm, what: tuple[str, str], source: str, local: bool) -> None:
    in_file, env = ("--authkey-file", write_key(farm)), without_key(farm)
    options, env = (in_file, env) if source == "file" else ((), farm.env())
    master = farm.master("1", "--results", "results.jsonl", *options, *(("--workers", 1, *what) if local else ()), env=env)
    if not local:
        farm.worker(master, *options, *what, env=env)
    assert master.wait() == 0, master.stderr
    text = (farm.folder / "results.jsonl").read_text()
    assert "PATH=" in text, "it has looked"
    assert farm.key not in text
    log = farm.folder / "imported.log"
    assert not log.exists() or farm.key not in log.read_text()


def test_the_variable_is_unset_and_not_only_empty(farm: Farm) -> None:
    master = farm.master("1", "--results", "results.jsonl", "--workers", 1, "--command", "echo ${TASK_AUTHKEY-unset} # {}")
    assert master.wait() == 0
    assert farm.records()[0]["result"]["stdout"] == "unset\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="looks into /proc")
def test_the_key_is_in_no_argument(farm: Farm) -> None:
    master = farm.master("--tasks", "-", "--workers", 2, stdin=subprocess.PIPE)
    master.wait_line("connected")
    arguments = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            arguments.append(Path(f"/proc/{entry}/cmdline").read_bytes())
    assert any(str(farm.folder).encode() in argument or b"task_worker.py" in argument for argument in arguments)
    assert not any(farm.key.encode() in argument for argument in arguments)


# ---- the file --------------------------------------------------------------------------------------------------------


def make_odd_file(path: Path, kind: str) -> None:
    """Nothing that a key may be in."""
    if "fifo" in kind:
        os.mkfifo(path.with_name("fifo"), 0o600)
    targets = {"fifo": "fifo", "endless": "/dev/zero"}
    if kind == "folder":
        path.mkdir()
    elif kind in targets:
        path.symlink_to(targets[kind])
    else:
        path.write_text("x" * 32)
        path.chmod({"readable by all": 0o644, "readable by another user's group": 0o640}.get(kind, 0o600))
        if "another user" in kind:
            os.chown(path, 12_345, -1)


KINDS = ["fifo", "folder", "endless", "readable by all", "another user's", "readable by another user's group"]


@pytest.mark.parametrize("named", [True, False], ids=["named", "in the home"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", ["task_master.py", "task_worker.py"])
def test_a_key_file_that_is_none_is_refused_in_one_line(farm: Farm, program: str, kind: str, named: bool) -> None:
    if "another user" in kind and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path = farm.folder / "odd" if named else farm.home / ".task_authkey"
    make_odd_file(path, kind)
    options = ("--authkey-file", path) if named else ()
    refused = farm.run(program, "--port", 0 if "master" in program else 1, *options, env=without_key(farm))
    assert refused.wait() == 2
    (line,) = refused.stderr
    assert str(path) in line


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_key_file_of_ones_own_is_taken_and_its_group_may_read_what_root_owns(farm: Farm, mode: int) -> None:
    if mode & 0o040 and os.geteuid() != 0:
        pytest.skip("only root can make such a file")
    options = ("--authkey-file", write_key(farm, mode))
    master = farm.master("1", *options, env=without_key(farm))
    assert (farm.worker(master, *options, env=without_key(farm)).wait(), master.wait()) == (0, 0)


def test_a_key_that_is_just_being_made_is_waited_for(farm: Farm) -> None:
    master = farm.master("1")
    path = farm.home / ".task_authkey"
    path.touch(0o600)
    worker = farm.worker(master, env=without_key(farm))
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(1.5)
    path.write_text(farm.key)
    assert (worker.wait(), master.wait()) == (0, 0)


def test_masters_that_start_together_without_a_key_agree_on_one(farm: Farm) -> None:
    masters = [farm.master("1", "--workers", 1, env=without_key(farm)) for _ in range(6)]
    path, give_up_at, seen = farm.home / ".task_authkey", time.monotonic() + PATIENCE, set()
    while any(master.process.poll() is None for master in masters) and time.monotonic() < give_up_at:
        with contextlib.suppress(FileNotFoundError):
            seen.add(path.read_bytes().strip())
        with contextlib.suppress(subprocess.TimeoutExpired):
            masters[0].process.wait(0.002)
    assert [master.wait() for master in masters] == [0] * 6, [master.stderr for master in masters]
    assert seen == {path.read_bytes().strip()}, "it was never seen empty, or another"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes().strip()) >= 32
    assert os.listdir(farm.home) == [".task_authkey"]

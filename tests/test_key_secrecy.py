"""The key is in no argument and no environment that a task sees; and a key file is a file of one's own, or one line."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from lab import PATIENCE, ROOT, Farm, check_one_line, check_said, free_port

MODULE = """
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
COMMAND = "echo ${TASK_AUTHKEY-unset}; env; echo {} >/dev/null; tr '\\0' ' ' </proc/$$/cmdline"
SHORT_KEY = "fifteen letters"
both_programs = pytest.mark.parametrize("program", ["task_master.py", "task_worker.py"])


def write_key(farm: Farm, mode: int = 0o600) -> Path:
    path = farm.write("key", f"\ufeff{farm.key}\r\n")  # as an editor on Windows leaves it
    path.chmod(mode)
    return path


@pytest.mark.parametrize("what", [("--function", "mod:spy"), ("--command", COMMAND)], ids=["function", "command"])
@pytest.mark.parametrize("source", ["environment", "file"])
@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
def test_no_task_sees_the_key(farm: Farm, what: tuple[str, str], source: str, local: bool) -> None:
    in_file, env = ("--authkey-file", write_key(farm)), farm.env(TASK_AUTHKEY=None)
    options, env = (in_file, env) if source == "file" else ((), farm.env())
    master = farm.master("1", "--results", "results.jsonl", *options, *(("--workers", 1, *what) if local else ()), env=env)
    if not local:
        farm.worker(master, *options, *what, env=env)
    assert master.wait() == 0, master.stderr
    text = (farm.folder / "results.jsonl").read_text()
    assert "PATH=" in text, "it has looked"
    assert farm.key not in text
    assert not [*farm.home.iterdir()], "no key file is made"
    log = farm.folder / "imported.log"
    assert farm.key not in log.read_text() if "--function" in what else '"unset\\n' in text


def test_the_key_is_in_no_argument(farm: Farm) -> None:
    master = farm.master("--tasks", "-", "--workers", 2, stdin=subprocess.PIPE)
    master.wait_line("connected")
    arguments = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert any("task_worker.py" in argument for argument in arguments)
    assert not any(farm.key in argument for argument in arguments)


def test_all_task_masters_of_a_program_have_the_key_from_the_environment(farm: Farm) -> None:
    code = "from task_master import TaskMaster; print([TaskMaster(port=0).authkey.decode() for _ in range(2)])"
    program = farm.run("-c", code, env=farm.env(PYTHONPATH=str(ROOT)))
    assert (program.wait(), program.stdout) == (0, [str([farm.key] * 2)])


@pytest.mark.parametrize("content", ["", " \n"], ids=["empty", "blank"])
@both_programs
def test_an_empty_key_is_refused(farm: Farm, program: str, content: str) -> None:
    farm.write("the.key", content).chmod(0o600)
    refused = farm.run(program, "--authkey-file", "the.key", env=farm.env(TASK_AUTHKEY=None))
    check_one_line(refused, 2, r"the\.key is empty.*: put .* 16 random bytes")
    check_one_line(farm.run(program, env=farm.env(TASK_AUTHKEY=content)), 2, "TASK_AUTHKEY is empty.*: put .* 16 random bytes")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_short_key_is_refused_beyond_loopback_only(farm: Farm, host: str) -> None:
    env = farm.env(TASK_AUTHKEY=SHORT_KEY)
    assert farm.master("--workers", 1, "3", env=env).wait() == 0
    if host == "::" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    master = farm.master("--no-tls", "--host", host, "1", env=env)
    check_one_line(master, 2, rf"the key has 15 bytes, too few to listen on {host}: use 16 ")


def test_a_worker_with_another_key_leaves_and_the_master_serves_on(any_farm: Farm) -> None:
    master = any_farm.master("3")
    stranger = any_farm.worker(master, env=any_farm.env(TASK_AUTHKEY="another-key-of-32-letters-or-so-"))
    check_said(stranger, 3, rf"the master at 127\.0\.0\.1:{master.port()} refused the key: copy its key file")
    assert (any_farm.worker(master).wait(), master.wait()) == (0, 0)
    assert master.stdout[-1] == "Result: 3 * 3 = 9"
    check_said(master, 0, "refused a connection from .*its key is another one")


def write_odd(path: Path, mode: int, owner: int = -1) -> None:
    path.write_text("x" * 32)
    path.chmod(mode)
    os.chown(path, owner, -1)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {  # what makes it, and what is said of it
    "missing": (lambda path: None, r"key file \S+: no such file or directory\W+\w+"),
    "fifo": (lambda path: os.mkfifo(path, 0o600), ""),
    "folder": (Path.mkdir, ""),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "no file"),
    "readable by others": (lambda path: write_odd(path, 0o604), r"can be .* by others: chmod 600 \S"),
    "writable by a group": (lambda path: write_odd(path, 0o620), r"can be .* by others: chmod 600 \S"),
    "another user's": (lambda path: write_odd(path, 0o600, 12_345), "another user"),
    "readable by another user's group": (lambda path: write_odd(path, 0o640, 12_345), ""),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "in the home"])
@pytest.mark.parametrize("kind", ODD)
@both_programs
def test_a_key_file_that_is_none_is_refused_in_one_line(farm: Farm, program: str, kind: str, named: bool) -> None:
    if "another user" in kind and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    if kind == "missing" and not named:
        pytest.skip("then the master makes it, and a worker waits for it")
    path = farm.folder / "odd" if named else farm.home / ".task_authkey"
    make, reason = ODD[kind]
    make(path)
    options = ("--authkey-file", path) if named else ()
    refused = farm.run(program, "--port", 0 if "master" in program else 1, *options, env=farm.env(TASK_AUTHKEY=None))
    check_one_line(refused, 2, re.escape(str(path)), reason)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440], ids=oct)
def test_a_key_file_of_ones_own_is_taken_and_its_group_may_read_what_root_owns(farm: Farm, mode: int) -> None:
    if mode & 0o040 and os.geteuid() != 0:
        pytest.skip("only root can make such a file")
    master = farm.master("3", "--authkey-file", write_key(farm, mode), env=farm.env(TASK_AUTHKEY=None))
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)


def test_a_master_makes_the_key_file_once_for_its_user_alone_and_workers_find_it(farm: Farm) -> None:
    env, path = farm.env(TASK_AUTHKEY=None), farm.home / ".task_authkey"
    first = farm.master("3", env=env, umask=0)
    assert (farm.worker(first, env=env).wait(), first.wait()) == (0, 0), first.stderr
    key = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", key)  # 256 bits
    assert first.said(rf"made the key file {path}\b")
    assert key.strip() not in "\n".join(first.stderr + first.stdout)
    second = farm.run_master("--workers", 1, "3", env=env)
    assert path.read_text() == key
    assert not second.said("key file")


@pytest.mark.parametrize(
    ("program", "home"),
    [("task_master.py", "missing"), ("task_master.py", "functions.py/home"), ("task_worker.py", "functions.py/home")],
)
def test_a_home_where_no_key_file_can_be_made_is_one_line(farm: Farm, program: str, home: str) -> None:
    path = farm.folder / home
    refused = farm.run(program, env=farm.env(TASK_AUTHKEY=None, HOME=str(path)))
    check_one_line(refused, 2, rf"cannot (make|read) the key file {re.escape(str(path))}/\.task_authkey: ")


def test_a_worker_without_a_key_says_where_to_copy_it_from(farm: Farm) -> None:
    worker = farm.run("task_worker.py", "--host", "192.0.2.1", env=farm.env(TASK_AUTHKEY=None))
    check_one_line(worker, 2, rf"no key in {farm.home}/\.task_authkey: copy that file from the master's host")
    worker = farm.run("task_worker.py", "--authkey-file", "", env=farm.env(TASK_AUTHKEY=None))
    check_one_line(worker, 2, "cannot read the key file : no such file")


def test_a_worker_may_be_started_before_the_master_and_before_the_key_exists(farm: Farm) -> None:
    port, path = free_port(), farm.home / ".task_authkey"
    worker = farm.worker(port, env=farm.env(TASK_AUTHKEY=None))
    worker.wait_line(rf"no key in {farm.home}/\.task_authkey.*start the master")
    path.touch(0o600)
    worker.pause(1.5)  # while the key is being made
    path.write_text(farm.key)
    master = farm.run("task_master.py", "--port", port, "3", env=farm.env(TASK_AUTHKEY=None))
    assert (worker.wait(), master.wait()) == (0, 0), (worker.stderr, master.stderr)
    assert master.stdout[-1] == "Result: 3 * 3 = 9"
    assert worker.stdout == ["Connect to server 127.0.0.1...", "run task 3 * 3...", "worker exit."]


def test_masters_that_start_together_without_a_key_agree_on_one(farm: Farm) -> None:
    masters = [farm.master("1", "--workers", 1, env=farm.env(TASK_AUTHKEY=None)) for _ in range(6)]
    path, give_up_at, seen = farm.home / ".task_authkey", time.monotonic() + PATIENCE, set()
    while any(master.is_running() for master in masters) and time.monotonic() < give_up_at:
        with contextlib.suppress(FileNotFoundError):
            seen.add(path.read_bytes().strip())
        time.sleep(0.002)
    assert [master.wait() for master in masters] == [0] * 6, [master.stderr for master in masters]
    assert seen == {path.read_bytes().strip()}, "it was never seen empty, or another"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes().strip()) >= 32
    assert os.listdir(farm.home) == [".task_authkey"]

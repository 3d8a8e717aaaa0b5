"""Each file copied alone does what it can; both work from any folder, in an empty home, and in either order of starting."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Farm, Program

ALONE = ("-I", "-S")  # Python takes nothing from the environment, the folder of the file, or site-packages


def copy_alone(farm: Farm, *names: str) -> Path:
    """A new folder that holds these files and nothing else."""
    folder = farm.folder / "alone"
    folder.mkdir()
    for name in names:
        shutil.copy(ROOT / name, folder)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def without_key(farm: Farm, **more: str) -> dict[str, str]:
    return {name: value for name, value in farm.env(**more).items() if name != "TASK_AUTHKEY"}


# ---- one file ------------------------------------------------------------------------------------------------------


def test_a_worker_copied_alone_serves_a_master(farm: Farm) -> None:
    folder = copy_alone(farm, "task_worker.py")
    master = farm.master("3", "4")
    worker = farm.run(*ALONE, folder / "task_worker.py", "--port", master.port(), "--processes", 2, cwd=folder)
    assert (worker.wait(), master.wait()) == (0, 0), worker.stderr
    assert sorted(master.stdout[-2:]) == ["Result: 3 * 3 = 9", "Result: 4 * 4 = 16"]
    assert worker.stdout[-1] == "worker exit."


def test_a_worker_copied_alone_finds_a_function_in_the_current_folder(farm: Farm) -> None:
    folder = copy_alone(farm, "task_worker.py")
    master = farm.master("21")
    options = ["--port", master.port(), "--processes", 1, "--function", "functions:double"]
    worker = farm.run(*ALONE, folder / "task_worker.py", *options)
    assert (worker.wait(), master.wait()) == (0, 0), worker.stderr
    assert master.stdout[-1] == "Result: 42"


def test_a_master_copied_alone_serves_workers(farm: Farm) -> None:
    folder = copy_alone(farm, "task_master.py")
    master = farm.run(*ALONE, folder / "task_master.py", "--port", 0, "--results", "out.jsonl", "3", cwd=folder)
    worker = farm.worker(master)
    assert (worker.wait(), master.wait()) == (0, 0), master.stderr
    assert [record["result"] for record in farm.records("alone/out.jsonl")] == ["3 * 3 = 9"]


def test_a_master_copied_alone_says_what_local_workers_need(farm: Farm) -> None:
    folder = copy_alone(farm, "task_master.py")
    master = farm.run(*ALONE, folder / "task_master.py", "--port", 0, "--workers", 1, "3", cwd=folder)
    assert master.wait() == 2
    assert len(master.stderr) == 1
    assert re.match(rf"task_master: --workers needs task_worker\.py .*{re.escape(str(folder))}", master.stderr[0])
    assert master.stdout == []


@pytest.mark.parametrize("name", ["task_master.py", "task_worker.py"])
def test_a_file_copied_alone_tells_its_version_and_its_options(farm: Farm, name: str) -> None:
    folder = copy_alone(farm, name)
    for option in ("--version", "--help"):
        program = farm.run(*ALONE, folder / name, option, cwd=folder)
        assert program.wait() == 0
        assert program.stderr == []


# ---- another folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_both_work_when_they_are_started_from_another_folder(farm: Farm, relative: bool) -> None:
    folder = copy_alone(farm, "task_master.py", "task_worker.py")
    work = farm.folder / "work"
    work.mkdir()
    (work / "mine.py").write_text("def triple(n):\n    return 3 * n\n")
    (work / "tasks.jsonl").write_text("14\n")
    path = os.path.join("..", "alone", "task_master.py") if relative else str(folder / "task_master.py")
    options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--workers", 1, "--function", "mine:triple"]
    master = farm.run(path, "--port", 0, *options, cwd=work)
    assert master.wait() == 0, master.stderr
    assert [record["result"] for record in farm.records("work/results.jsonl")] == [42]
    left = {entry.name for entry in folder.iterdir()}
    assert left <= {"task_master.py", "task_worker.py", "__pycache__"}


# ---- the key -------------------------------------------------------------------------------------------------------


def run_pair(farm: Farm, env: dict[str, str], **options: Any) -> Program:
    """A master and a worker with this environment, to their end."""
    master = farm.master("3", env=env, **options)
    worker = farm.worker(master, env=env)
    assert (worker.wait(), master.wait()) == (0, 0), (worker.stderr, master.stderr)
    return master


@pytest.mark.skipif(os.name != "posix", reason="file modes are of POSIX")
def test_a_master_makes_the_key_file_for_its_user_alone_and_workers_find_it(farm: Farm) -> None:
    master = run_pair(farm, without_key(farm), umask=0)
    path = farm.home / ".task_authkey"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", path.read_text())  # 256 bits
    assert [line for line in master.stderr if re.search(rf"made the key file {path}\b", line)]
    assert path.read_text().strip() not in "\n".join(master.stderr + master.stdout)


def test_a_key_file_is_made_once(farm: Farm) -> None:
    run_pair(farm, without_key(farm))
    key = (farm.home / ".task_authkey").read_bytes()
    master = run_pair(farm, without_key(farm))
    assert (farm.home / ".task_authkey").read_bytes() == key
    assert not [line for line in master.stderr if "key file" in line]


def test_a_key_in_the_environment_makes_no_key_file(farm: Farm) -> None:
    run_pair(farm, farm.env())
    assert list(farm.home.iterdir()) == []


@pytest.mark.parametrize("home", ["missing", "functions.py/home"], ids=["missing", "below a file"])
def test_a_home_where_no_key_file_can_be_made_is_one_line(farm: Farm, home: str) -> None:
    path = farm.folder / home
    master = farm.master("3", env=without_key(farm, HOME=str(path)))
    assert master.wait() == 2
    assert len(master.stderr) == 1, master.stderr
    assert re.match(rf"task_master: cannot (make|read) the key file {re.escape(str(path))}/\.task_authkey: ", master.stderr[0])


# ---- either order --------------------------------------------------------------------------------------------------


def test_a_worker_may_be_started_before_the_master_and_before_the_key_exists(farm: Farm) -> None:
    port = free_port()
    worker = farm.run("task_worker.py", "--port", port, "--processes", 1, env=without_key(farm))
    worker.wait_line(rf"no key in {farm.home}/\.task_authkey.*start the master")
    master = farm.run("task_master.py", "--port", port, "3", env=without_key(farm))
    assert (worker.wait(), master.wait()) == (0, 0), (worker.stderr, master.stderr)
    assert master.stdout[-1] == "Result: 3 * 3 = 9"
    assert worker.stdout == ["Connect to server 127.0.0.1...", "run task 3 * 3...", "worker exit."]


def test_a_worker_may_be_started_before_the_master(farm: Farm) -> None:
    port = free_port()
    worker = farm.run("task_worker.py", "--port", port, "--processes", 2)
    worker.wait_line(rf"waiting for the master at 127\.0\.0\.1:{port}")
    master = farm.run("task_master.py", "--port", port, "3", "4")
    assert (worker.wait(), master.wait()) == (0, 0), (worker.stderr, master.stderr)
    assert sorted(master.stdout[-2:]) == ["Result: 3 * 3 = 9", "Result: 4 * 4 = 16"]

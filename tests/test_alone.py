"""A worker's file copied alone does all; both files work from any folder, in an empty home, and in either order of starting."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, Farm, Program, free_port, without_key

ALONE = ("-I", "-S")  # Python takes nothing from the environment, the folder of the file, or site-packages


def copy_alone(farm: Farm, *names: str) -> Path:
    """A new folder that holds these files and nothing else."""
    folder = farm.folder / "alone"
    folder.mkdir()
    for name in names:
        shutil.copy(ROOT / name, folder)
    return folder


# ---- the files -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "through a link"])
def test_a_master_finds_the_file_beside_it(farm: Farm, linked: bool) -> None:
    path = copy_alone(farm, "task_master.py", "task_worker.py") / "task_master.py"
    if linked:
        (farm.folder / "farm").symlink_to(path)
        path = farm.folder / "farm"
    master = farm.run(*ALONE, path, "--port", 0, "--results", "out.jsonl", "3")
    worker = farm.worker(master)
    assert (worker.wait(), master.wait()) == (0, 0), master.stderr
    assert [record["result"] for record in farm.records("out.jsonl")] == ["3 * 3 = 9"]


@pytest.mark.parametrize("options", [["--port", "0", "3"], ["--help"], ["--nonsense"]], ids=" ".join)
def test_a_master_copied_alone_says_what_is_missing(farm: Farm, options: list[str]) -> None:
    folder = copy_alone(farm, "task_master.py")
    master = farm.run(*ALONE, folder / "task_master.py", *options, cwd=folder)
    assert master.wait() == 2
    assert re.match(rf"task_master: task_worker\.py is missing: .*{re.escape(str(folder))}", *master.stderr)
    assert master.stdout == []


@pytest.mark.parametrize("name", ["task_master.py", "task_worker.py"])
def test_a_copy_tells_its_version_and_its_options(farm: Farm, name: str) -> None:
    folder = copy_alone(farm, "task_worker.py", *["task_master.py"] * (name == "task_master.py"))
    for option in ("--version", "--help"):
        program = farm.run(*ALONE, folder / name, option, cwd=folder)
        assert program.wait() == 0
        assert program.stderr == []


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_both_work_when_they_are_started_from_another_folder(farm: Farm, relative: bool) -> None:
    folder = copy_alone(farm, "task_master.py", "task_worker.py")
    (farm.folder / "work").mkdir()
    farm.write("work/mine.py", "def triple(n):\n    return 3 * n\n")
    farm.write("work/tasks.jsonl", "14\n")
    path = os.path.join("..", "alone", "task_master.py") if relative else str(folder / "task_master.py")
    options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--workers", 1, "--function", "mine:triple"]
    master = farm.run(path, "--port", 0, *options, cwd=farm.folder / "work")
    assert master.wait() == 0, master.stderr
    assert [record["result"] for record in farm.records("work/results.jsonl")] == [42]
    assert {entry.name for entry in folder.iterdir()} <= {"task_master.py", "task_worker.py", "__pycache__"}


# ---- the key -------------------------------------------------------------------------------------------------------


def run_pair(farm: Farm, env: dict[str, str], **options: Any) -> Program:
    """A master and a worker with this environment, to their end."""
    master = farm.master("3", env=env, **options)
    worker = farm.worker(master, env=env)
    assert (worker.wait(), master.wait()) == (0, 0), (worker.stderr, master.stderr)
    return master


@pytest.mark.skipif(os.name != "posix", reason="file modes are of POSIX")
def test_a_master_makes_the_key_file_once_for_its_user_alone_and_workers_find_it(farm: Farm) -> None:
    first = run_pair(farm, without_key(farm), umask=0)
    path = farm.home / ".task_authkey"
    key = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", key)  # 256 bits
    assert first.said(rf"made the key file {path}\b")
    assert key.strip() not in "\n".join(first.stderr + first.stdout)
    second = run_pair(farm, without_key(farm))
    assert path.read_text() == key
    assert not second.said("key file")


def test_a_key_in_the_environment_makes_no_key_file(farm: Farm) -> None:
    run_pair(farm, farm.env())
    assert list(farm.home.iterdir()) == []


@pytest.mark.parametrize("home", ["missing", "functions.py/home"], ids=["missing", "below a file"])
def test_a_home_where_no_key_file_can_be_made_is_one_line(farm: Farm, home: str) -> None:
    path = farm.folder / home
    master = farm.master("3", env=without_key(farm, HOME=str(path)))
    assert master.wait() == 2
    pattern = rf"task_master: cannot (make|read) the key file {re.escape(str(path))}/\.task_authkey: "
    assert re.match(pattern, *master.stderr)


def test_a_worker_may_be_started_before_the_master_and_before_the_key_exists(farm: Farm) -> None:
    port = free_port()
    worker = farm.worker(port, env=without_key(farm))
    worker.wait_line(rf"no key in {farm.home}/\.task_authkey.*start the master")
    master = farm.run("task_master.py", "--port", port, "3", env=without_key(farm))
    assert (worker.wait(), master.wait()) == (0, 0), (worker.stderr, master.stderr)
    assert master.stdout[-1] == "Result: 3 * 3 = 9"
    assert worker.stdout == ["Connect to server 127.0.0.1...", "run task 3 * 3...", "worker exit."]

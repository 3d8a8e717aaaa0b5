"""A worker's file copied alone does all; both files work from any folder, in an empty home, and in either order of starting."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from lab import ROOT, Farm

ALONE = ("-I", "-S")  # Python takes nothing from the environment, the folder of the file, or site-packages


def copy_alone(farm: Farm, *names: str) -> Path:
    """A new folder that holds these files and nothing else."""
    folder = farm.folder / "alone"
    folder.mkdir()
    for name in names:
        shutil.copy(ROOT / name, folder)
    return folder


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

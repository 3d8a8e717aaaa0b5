"""A worker's file copied alone does all; both files work from any folder, in an empty home, and print what the tutorial does."""

from __future__ import annotations

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


def test_a_worker_copied_alone_and_its_master_print_what_the_tutorial_prints(farm: Farm) -> None:
    folder = copy_alone(farm, "task_worker.py")
    master = farm.master()
    worker = farm.run(*ALONE, folder / "task_worker.py", "--port", master.port(), "--processes", 2, cwd=folder)
    assert (worker.wait(), master.wait()) == (0, 0), worker.stderr
    numbers = [int(line.split()[2].rstrip(".")) for line in master.stdout[:10]]
    assert all(0 <= number <= 10000 for number in numbers)
    assert master.stdout[:11] == [*[f"Put task {n}..." for n in numbers], "Try get results..."]
    assert sorted(master.stdout[11:]) == sorted(f"Result: {n} * {n} = {n * n}" for n in numbers)
    assert worker.stdout[0] == "Connect to server 127.0.0.1..."
    assert sorted(worker.stdout[1:11]) == sorted(f"run task {n} * {n}..." for n in numbers)
    assert worker.stdout[11:] == ["worker exit."]


@pytest.mark.parametrize("options", [["--port", "0", "3"], ["--help"], ["--nonsense"]], ids=" ".join)
def test_a_master_copied_alone_says_what_is_missing(farm: Farm, options: list[str]) -> None:
    folder = copy_alone(farm, "task_master.py")
    master = farm.run(*ALONE, folder / "task_master.py", *options, cwd=folder)
    assert master.wait() == 2
    assert re.match(rf"task_master: task_worker\.py is missing: .*{re.escape(str(folder))}", *master.stderr)
    assert master.stdout == []


@pytest.mark.parametrize("name", ["task_master", "task_worker"])
def test_a_copy_tells_its_version_and_its_options_without_docstrings_too(farm: Farm, name: str) -> None:
    folder = copy_alone(farm, "task_worker.py", *["task_master.py"] * (name == "task_master"))
    for option, expected in (("--version", r"\d+\.\d+\.\d+"), ("--help", r".*\n  --port PORT .*")):
        program = farm.run(*ALONE, "-OO", folder / f"{name}.py", option, cwd=folder)
        assert program.wait() == 0
        assert re.fullmatch(rf"(usage: )?{name} {expected}", "\n".join(program.stdout), re.DOTALL)
        assert max(map(len, program.stdout)) <= 80
        assert program.stderr == []


def test_a_worker_is_started_as_a_module_though_a_file_there_has_the_name_of_a_standard_one(farm: Farm) -> None:
    folder = copy_alone(farm, "task_worker.py")
    (folder / "statistics.csv").write_text("1,2,3\n")
    master = farm.master("--results", "results.jsonl", "3")
    worker = farm.run("-S", "-m", "task_worker", "--port", master.port(), cwd=folder)
    assert (worker.wait(), master.wait()) == (0, 0), worker.stderr


@pytest.mark.parametrize("path", ["{folder}/alone/task_master.py", "../alone/task_master.py", "../link"])
def test_both_files_work_when_they_are_started_from_another_folder(farm: Farm, path: str) -> None:
    folder = copy_alone(farm, "task_master.py", "task_worker.py")
    (farm.folder / "link").symlink_to(folder / "task_master.py")
    (farm.folder / "work").mkdir()
    farm.write("work/mine.py", "def triple(n):\n    return 3 * n\n")
    farm.write("work/tasks.jsonl", "14\n")
    options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--workers", 1, "--function", "mine:triple"]
    master = farm.run(*ALONE, path.format(folder=farm.folder), "--port", 0, *options, cwd=farm.folder / "work")
    assert master.wait() == 0, master.stderr
    assert [record["result"] for record in farm.records("work/results.jsonl")] == [42]
    assert {entry.name for entry in folder.iterdir()} <= {"task_master.py", "task_worker.py", "__pycache__"}

"""What is packed: the source archive has all that the tests need, the wheel has the two modules and two commands."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import ROOT, Farm

import task_worker

# Without the network: with the tools that are installed here
pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} is not installed")
    for name in ("build", "setuptools", "wheel")
]
NAME = f"task_master_worker-{task_worker.__version__}"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The unpacked source archive, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(".[!c]*", "__pycache__", "*.egg-info", "build", "dist"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "copy")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = [path for path in folder.glob("*-*/") if path.is_dir()]
    yield source, folder / f"{NAME}-py3-none-any.whl"


def test_the_wheel_has_the_two_modules_and_nothing_else(packed: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(packed[1]) as wheel:
        names = [name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")]
    assert sorted(names) == ["task_master.py", "task_worker.py"]


def test_the_source_archive_has_all_files_of_the_repository(packed: tuple[Path, Path]) -> None:
    wanted = {"README.md", "pyproject.toml", "task_master.py", "task_worker.py"}
    wanted |= {f"tests/{path.name}" for path in (ROOT / "tests").iterdir() if path.is_file()}
    assert {name for name in wanted if not (packed[0] / name).is_file()} == set()


def test_tests_pass_in_the_unpacked_source_archive(packed: tuple[Path, Path]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "tests/test_wire.py"]
    tested = subprocess.run(command, cwd=packed[0], env=environment, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_both_commands_run_when_the_wheel_is_installed(packed: tuple[Path, Path], farm: Farm) -> None:
    place = farm.folder / "place"
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(place)]
    command = [sys.executable, "-m", "pip", "install", *options, str(packed[1])]
    installed = subprocess.run(command, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    env = farm.env(PYTHONPATH=str(place))
    master = farm.start([str(place / "bin" / "task-master"), "--port", "0", "--tasks", "-"], env, stdin=subprocess.PIPE)
    worker = farm.start([str(place / "bin" / "task-worker"), "--port", str(master.port()), "--processes", "1"], env)
    master.give([7])
    assert (master.wait(), worker.wait()) == (0, 0), (master.lines, worker.lines)
    assert master.stdout[-1] == "Result: 7 * 7 = 49"

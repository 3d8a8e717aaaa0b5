"""Whole jobs: the session of the tutorial, its one-command form, and the digests of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import random
import re
import sysconfig
from pathlib import Path

from lab import Farm, check_once


def test_master_first_then_worker_prints_what_the_tutorial_prints(farm: Farm) -> None:
    master = farm.master()
    worker = farm.worker(master)
    assert (worker.wait(), master.wait()) == (0, 0)
    numbers = [int(line.split()[2].rstrip(".")) for line in master.stdout[:10]]
    assert all(0 <= number <= 10000 for number in numbers)
    assert master.stdout[:11] == [*[f"Put task {n}..." for n in numbers], "Try get results..."]
    assert sorted(master.stdout[11:]) == sorted(f"Result: {n} * {n} = {n * n}" for n in numbers)
    assert worker.stdout[0] == "Connect to server 127.0.0.1..."
    assert sorted(worker.stdout[1:11]) == sorted(f"run task {n} * {n}..." for n in numbers)
    assert worker.stdout[11:] == ["worker exit."]


def test_one_command_runs_the_demonstration_with_local_workers(farm: Farm) -> None:
    master = farm.master("--workers", 2)
    assert master.wait() == 0
    assert len([line for line in master.stdout if re.fullmatch(r"Result: (\d+) \* \1 = \d+", line)]) == 10
    assert "worker exit." in master.stderr


DIGEST = """
import hashlib

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
"""


def sample_library(count: int) -> list[str]:
    """Paths of `count` files of the running Python's standard library, the same ones each time."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [str(path) for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    return random.Random(20).sample(paths, count)


def test_the_digests_of_the_standard_library_are_right_and_bad_paths_are_failed_records(farm: Farm) -> None:
    farm.write("digest.py", DIGEST)
    unreadable = farm.write("unreadable.py", "secret\n")
    unreadable.chmod(0)
    good = sample_library(300)
    bad = {str(farm.folder / "vanished.py"): "FileNotFoundError", str(farm.folder): "IsADirectoryError"}
    if not os.access(unreadable, os.R_OK):  # root may read it
        bad[str(unreadable)] = "PermissionError"
    paths = [*good[:100], *bad, *good[100:]]
    with farm.write("paths", "".join(path + "\n" for path in paths)).open("rb") as stdin:
        master = farm.run_job("--text", "--tasks", "-", function="digest:sha256", status=1, stdin=stdin)
    check_once(farm.records(), len(paths))
    for record in farm.records():
        path = record["task"]
        assert path == paths[record["id"]]
        if path in bad:
            assert record["error"]["type"] == bad[path]
            assert path in record["error"]["message"]
        else:
            assert record["result"] == hashlib.sha256(Path(path).read_bytes()).hexdigest(), path
    assert master.said(f"{len(bad)} failed")

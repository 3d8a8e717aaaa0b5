"""A real job: the SHA-256 of files of the running Python's standard library."""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from pathlib import Path

from conftest import Farm

DIGEST = """
import hashlib

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
"""


def sample_library(count: int) -> list[str]:
    """Paths of `count` files, the same ones each time."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [str(path) for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    return random.Random(20).sample(paths, min(count, len(paths)))


def test_the_digests_of_the_standard_library_are_right_and_bad_paths_are_failed_records(farm: Farm) -> None:
    (farm.folder / "digest.py").write_text(DIGEST)
    vanished, unreadable = farm.folder / "vanished.py", farm.folder / "unreadable.py"
    unreadable.write_text("secret\n")
    unreadable.chmod(0)
    good = sample_library(300)
    bad = {str(vanished): "FileNotFoundError", str(farm.folder): "IsADirectoryError"}
    if not os.access(unreadable, os.R_OK):  # root may read it
        bad[str(unreadable)] = "PermissionError"
    paths = [*good[:100], *bad, *good[100:]]
    (farm.folder / "paths").write_text("".join(path + "\n" for path in paths))

    with open(farm.folder / "paths", "rb") as stdin:
        options = ["--workers", 2, "--function", "digest:sha256", "--results", "out.jsonl"]
        master = farm.master("--text", "--tasks", "-", *options, stdin=stdin)
        assert master.wait() == 1

    records = {record["id"]: record for record in farm.records("out.jsonl")}
    assert len(farm.records("out.jsonl")) == len(records) == len(paths)
    assert [records[number]["task"] for number in range(len(paths))] == paths
    assert len(good) >= 200
    for path in good:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert records[paths.index(path)]["result"] == digest, path
    for path, error in bad.items():
        assert records[paths.index(path)]["error"]["type"] == error
        assert path in records[paths.index(path)]["error"]["message"]
    assert [line for line in master.stderr if f"{len(bad)} failed" in line]

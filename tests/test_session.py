"""The session of the tutorial, and the one-command form of it."""

from __future__ import annotations

import re

from conftest import Farm


def check_session(master_lines: list[str], worker_lines: list[str]) -> None:
    numbers = [int(line.split()[2].rstrip(".")) for line in master_lines[:10]]
    assert master_lines[:10] == [f"Put task {n}..." for n in numbers]
    assert master_lines[10] == "Try get results..."
    assert sorted(master_lines[11:]) == sorted(f"Result: {n} * {n} = {n * n}" for n in numbers)
    assert worker_lines[0] == "Connect to server 127.0.0.1..."
    assert sorted(worker_lines[1:11]) == sorted(f"run task {n} * {n}..." for n in numbers)
    assert worker_lines[11:] == ["worker exit."]


def test_master_first_then_worker_prints_what_the_tutorial_prints(farm: Farm) -> None:
    master = farm.master()
    worker = farm.worker(master)
    assert (worker.wait(), master.wait()) == (0, 0)
    check_session(master.stdout, worker.stdout)


def test_one_command_runs_the_demonstration_with_local_workers(farm: Farm) -> None:
    master = farm.master("--workers", 2)
    assert master.wait() == 0
    assert len([line for line in master.stdout if re.fullmatch(r"Result: (\d+) \* \1 = \d+", line)]) == 10
    assert "worker exit." in master.stderr

"""Random histories of one results file, compared with a model: kills, drains, torn ends, full disks, other functions and inputs.

HISTORIES=200 in the environment runs as many (HISTORIES=100-200 those seeds); the name of a test tells its seed.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import signal
from typing import Any

import pytest
from lab import Farm, Program, check_silence, wait_until

MODULE = """
import os, time

def work(name, n):
    with open("started.log", "a") as file:
        file.write(f"{name} {n}\\n")
    time.sleep(0.002)
    if n % 10 == 7 and not os.path.exists("mended"):
        raise ValueError(n)
    return f"{name} {n}"

def a(n): return work("a", n)
def b(n): return work("b", n)
"""
COUNT = 60
TASKS = [1000 + n for n in range(COUNT)]
FIRST, _, LAST = os.environ.get("HISTORIES", "3").rpartition("-")


class History:
    """A results file, and what must be in it."""

    def __init__(self, farm: Farm, seed: int) -> None:
        self.farm, self.dice, self.port = farm, random.Random(seed), 0
        self.path, self.log = farm.folder / "results.jsonl", farm.folder / "started.log"
        farm.write_tasks(TASKS)

    def start(self, *options: object) -> Program:
        """A master on the port of this history; it resumes if there is something to."""
        unbuffered = self.dice.choice(["", "1"])
        argv = ["--port", self.port, "--results", self.path.name, *["--resume"] * bool(self.size()), *options]
        master = self.farm.run("task_master.py", *argv, env=self.farm.env(PYTHONUNBUFFERED=unbuffered))
        self.port = self.port or master.port()
        return master

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def records(self) -> list[dict[str, Any]]:
        """Of the whole lines; a torn last one does not count."""
        whole = self.path.read_bytes().rpartition(b"\n")[0] if self.size() else b""
        return [json.loads(line) for line in whole.splitlines()]

    def kept(self) -> dict[int, dict[str, Any]]:
        """The tasks that are done, by the last record of each."""
        return {n: record for n, record in {record["id"]: record for record in self.records()}.items() if "result" in record}

    def run(self, how: str) -> int:
        """Run the job until it ends, or is ended; compare the file with what was there before. Returns the exit status."""
        before, size, function = self.kept(), self.size(), self.dice.choice("ab")
        self.log.write_text("")
        what = ["--tasks", "tasks.jsonl", *self.dice.choice([[], ["--ordered"]])]
        local = ["--workers", self.dice.choice([1, 2]), "--function", f"mod:{function}"]
        if how == "full disk":  # for the master alone
            master = self.start(*what)
            limit = size + self.dice.randrange(3000)
            resource.prlimit(master.pid, resource.RLIMIT_FSIZE, (limit, limit) if master.port() else ())
            self.farm.worker(master, "--function", f"mod:{function}", "--wait", 0.1)
        else:
            master = self.start(*what, *local)
        if how in ("kill", "drain"):
            enough = size + self.dice.randrange(6000)
            wait_until(lambda: self.size() >= enough or not master.is_running())
            master.signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        status = master.wait()
        check_silence(master)
        self.compare(before, function)
        if f"{how} {status}" in ("end 0", "end 1"):
            self.check_ended(master, status)
        else:
            allowed = {"kill": (-9, 0, 1), "drain": (143, 0, 1), "full disk": (0, 1), "end": (0, 1)}
            assert status in allowed[how], master.stderr
        return status

    def compare(self, before: dict[int, dict[str, Any]], function: str) -> None:
        """What was done is as it was and was not started again; what is new was done by this function for this task."""
        now, started = self.kept(), self.log.read_text().splitlines()
        assert {n: now.get(n) for n in before} == before
        assert not {f"{function} {TASKS[n]}" for n in before} & set(started)
        for n in set(now) - set(before):
            assert (now[n]["task"], now[n]["result"]) == (TASKS[n], f"{function} {TASKS[n]}")
            assert now[n]["result"] in started
        for record in self.records():
            assert record["task"] == TASKS[record["id"]]
            assert "result" in record or (record["error"]["type"], record["error"]["message"]) == (
                "ValueError",
                str(record["task"]),
            )

    def check_ended(self, master: Program, status: int) -> None:
        """Each task has one record, and the summary counts them."""
        counts = collections.Counter(record["id"] for record in self.records())
        assert counts == dict.fromkeys(range(COUNT), 1)
        failed = COUNT - len(self.kept())
        assert status == (1 if failed else 0)
        assert any(f"{COUNT - failed} done, {failed} failed" in line for line in master.stderr), master.stderr

    def tear(self) -> None:
        """As after a power cut: the last line is cut, perhaps with zeros behind it."""
        if self.size():
            last = len(self.path.read_bytes().splitlines()[-1])
            os.truncate(self.path, self.size() - self.dice.randrange(1, last))
            with self.path.open("ab") as file:
                file.write(b"\0" * self.dice.choice([0, 0, 700]))

    def refuse(self) -> None:
        """No tasks, other tasks, or a file that would be overwritten: exit status 2, and all is as it was."""
        before = self.path.read_bytes() if self.size() else b""
        other = self.farm.write_tasks([task + (task - 1000 in self.kept()) for task in TASKS], "other.jsonl")
        kinds: list[list[object]] = [["--resume", "--workers", 1]]
        kinds += [["--resume", "--tasks", other]] * bool(self.kept()) + [["--tasks", "tasks.jsonl"]] * bool(before)
        self.farm.run_master("--results", self.path.name, *self.dice.choice(kinds), status=2)
        assert (self.path.read_bytes() if self.size() else b"") == before


@pytest.mark.parametrize("seed", range(int(FIRST or 0), int(LAST)))
def test_a_results_file_holds_what_happened_whatever_happens(farm: Farm, seed: int) -> None:
    history = History(farm, seed)
    for _ in range(history.dice.randrange(2, 7)):
        how = history.dice.choice(["kill", "kill", "drain", "full disk", "end", "tear", "refuse"])
        if how in ("tear", "refuse"):
            getattr(history, how)()
        else:
            history.run(how)
    (farm.folder / "mended").touch()
    assert history.run("end") == 0

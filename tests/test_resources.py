"""What a system can run out of costs a worker some of its processes and a line, and no task anything."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from typing import Any

import pytest
from lab import ANOTHER_USER, ROOT, Farm, Program, check_silence, needs_setpriv

import task_worker

TASKS = 60
MODULE = """
import time
from functions import stay

def work(n):
    time.sleep(0.02)
    return 2 * n

def wait(n):
    return 2 * stay(n)
"""


@pytest.fixture(autouse=True)
def tasks(farm: Farm) -> None:
    farm.write_tasks(range(TASKS))


JOB = ("--port", 0, "--tasks", "tasks.jsonl", "--results", "results.jsonl", "--redeliveries", 0)


def start_master(farm: Farm, *options: object, after: str = "") -> Program:
    """A master, after something was done in its process, for which a task that is lost once has failed."""
    return farm.run_after(after, "task_master.py", *JOB, *options)


def check_all_done(farm: Farm) -> None:
    farm.check_doubled(TASKS)
    assert {record["attempts"] for record in farm.records()} == {1}


def check_lines(program: Program, pattern: str) -> None:
    """Some line names the limit and the remedy; they are few, and none is a traceback."""
    lines = [line for line in program.stderr if line.startswith("task_")]
    assert program.said(f"(?i){pattern}"), program.stderr
    assert len(lines) < 8, lines
    if not program.said("EOFError: Ran out of input"):  # Python says that of a process during whose start memory ran out
        assert lines == program.stderr or not lines, program.stderr
        check_silence(program)


LIMITS = {
    "files": ("RLIMIT_NOFILE", 64, 30, r"(open files|descriptors|ulimit -n).*(ulimit -n|--processes)"),
    "address space": ("RLIMIT_AS", 700 << 20, 100, r"(memory|threads?|ulimit).*(ulimit -|--processes|memory)"),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
def test_a_worker_goes_on_with_the_processes_that_it_could_start(farm: Farm, limit: str, local: bool) -> None:
    name, value, processes, pattern = LIMITS[limit]
    preparation = f"resource.setrlimit(resource.{name}, ({value}, {value}))"
    what = ("--function", "mod:work")
    if local:
        worker = master = start_master(farm, "--workers", processes, *what, after=preparation)
    else:
        master = start_master(farm)
        where = ("--port", master.port(), "--processes", processes, *what)
        worker = farm.run_after(preparation, "task_worker.py", *where)
    assert (master.wait(), worker.wait()) == (0, 0), worker.stderr
    check_all_done(farm)
    if not local:  # a local one says it on its master's, between the other lines
        check_lines(worker, pattern)
    assert worker.said(f"(?i){pattern}"), worker.stderr


@needs_setpriv
def test_a_worker_whose_user_may_have_no_more_processes_goes_on_with_what_it_has(farm: Farm) -> None:
    master = start_master(farm)
    place = [*ANOTHER_USER, "prlimit", "--nproc=26", sys.executable, str(ROOT / "task_worker.py")]
    worker = farm.start([*place, "--port", str(master.port()), "--processes", "12", "--function", "mod:work"])
    assert (master.wait(), worker.wait()) == (0, 0)
    check_all_done(farm)
    check_lines(worker, r"(ulimit -u|processes|threads).*(ulimit -u|--processes)")


def test_a_worker_that_runs_out_of_files_later_loses_no_task(farm: Farm) -> None:
    """Its processes cannot be replaced any more; another worker does the rest."""
    master = start_master(farm)
    worker = farm.worker(master, "--processes", 2, "--tasks-per-process", 1, "--function", "mod:wait")
    worker.wait_line("it runs", "stdout", count=2)
    for process in [worker, *worker.descendants()]:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (8, 8))
    farm.let_go()
    worker.wait_line(LIMITS["files"][3])
    other = farm.worker(master, "--function", "mod:wait")
    assert (master.wait(), other.wait()) == (0, 0)
    check_all_done(farm)
    assert worker.wait() in (0, 2, 3)
    check_silence(worker)


def test_a_master_with_few_files_serves_as_many_workers_as_it_can(farm: Farm) -> None:
    master = start_master(farm, after="resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))")
    worker = farm.worker(master, "--processes", 60, "--function", "mod:work")
    assert (master.wait(), worker.wait()) == (0, 0)
    check_all_done(farm)
    check_silence(master, worker)


PLACES = {
    "read-only": "mount -t tmpfs -o ro none /dev/shm",
    "full": "mount -t tmpfs -o size=4k none /dev/shm && echo x >/dev/shm/x",
    "absent": "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9",
    "full, as all is": "export TMPDIR=/mnt; for d in /dev/shm /mnt; do mount -t tmpfs -o size=4k none $d && echo x >$d/x; done",
}


def may_mount() -> bool:
    command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt && mknod /mnt/null c 1 3"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there is no memfd that could be forbidden")
def test_a_process_needs_no_memfd_where_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbid)
    memory = task_worker.Memory()
    memory.bytes[task_worker.MEMORY_SIZE - 1] = 7
    memory.words[1] = 2.5
    assert memory.words[1] == 2.5


@pytest.mark.parametrize("place", PLACES)
def test_a_job_needs_no_shared_memory_of_the_system(farm: Farm, place: str) -> None:
    if not may_mount():
        pytest.skip("no mount namespaces here")
    command = [sys.executable, str(ROOT / "task_master.py"), *map(str, JOB), "--workers", "2", "--function", "mod:work"]
    master = farm.start(["unshare", "--mount", "sh", "-c", PLACES[place] + '; exec "$@"', "sh", *command])
    assert master.wait() == 0, master.stderr
    check_all_done(farm)


def test_output_of_a_command_that_a_full_disk_has_cut_is_no_result(farm: Farm) -> None:
    if not may_mount():
        pytest.skip("no mount namespaces here")
    command = [sys.executable, str(ROOT / "task_master.py"), "--port", "0", "--results", "results.jsonl", "--workers", "1"]
    mount = 'mount -t tmpfs -o size=64k none /mnt && TMPDIR=/mnt exec "$@"'
    job = farm.start(["unshare", "--mount", "sh", "-c", mount, "sh", *command, "--command", "seq {} | cat; true", "9", "99999"])
    assert job.wait() == 1, job.stderr
    good, cut = farm.in_order()
    assert good["result"]["stdout"].endswith("8\n9\n")
    assert "No space left on device" in cut["error"]["message"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("what", [(), ("--command", "echo $((2 * TASK))")], ids=["function", "command"])
def test_a_worker_whose_current_directory_was_deleted_loses_no_task(farm: Farm, when: str, what: Any) -> None:
    """It does without it, or leaves with a line that says so; another does the rest."""
    master = start_master(farm)
    gone = farm.folder / "gone"
    gone.mkdir()
    options = ("--port", master.port(), "--processes", 2, *what, *(("--tasks-per-process", 3) if when == "meanwhile" else ()))
    worker = farm.run_after("os.rmdir(os.getcwd())" if when == "before" else "", "task_worker.py", *options, cwd=gone)
    if when == "meanwhile":
        worker.wait_line("Connect to", "stdout")
        gone.rmdir()
    if worker.wait() != 0:
        assert worker.wait() in (2, 3)
        assert worker.said("(?i)director|folder"), worker.stderr
        assert farm.worker(master, "--processes", 2, *what).wait() == 0
    assert master.wait() == 0
    check_silence(worker)
    farm.check_once(TASKS)
    assert {record["attempts"] for record in farm.records()} == {1}


def test_a_worker_that_cannot_replace_a_process_finishes_what_the_others_run(farm: Farm) -> None:
    code = "import os\nfrom functions import stay\n\ndef work(n):\n    return 2 * stay(n) if n else os.remove('rare.py') or 0\n"
    farm.write("rare.py", code)
    farm.write_tasks([1, 0, 2])
    master = start_master(farm)
    worker = farm.worker(master, "--processes", 2, "--tasks-per-process", 1, "--function", "rare:work")
    worker.wait_line("No module named 'rare' .*; finishing what runs")
    worker.drain()  # which is the first, and so asks for the same
    farm.let_go()
    assert worker.wait() == 2
    assert farm.values() == [2, 0]
    farm.write("rare.py", code)
    assert (farm.worker(master, "--function", "rare:work").wait(), master.wait()) == (0, 0)
    assert {record["attempts"] for record in farm.records()} == {1}


def test_a_worker_that_is_refused_leaves_though_a_task_runs(farm: Farm) -> None:
    master = farm.master("1", "--results", "results.jsonl")
    worker = farm.worker(master, "--processes", 2, "--function", "functions:stay")
    worker.wait_line("it runs", "stdout")
    port = master.port()
    master.kill()
    other = farm.run("task_master.py", "--port", port, "1", env=farm.env(TASK_AUTHKEY="another-key-of-32-letters-or-so-"))
    assert worker.wait() == 3, other.stderr
    assert worker.stderr[-1].endswith("refused the key: copy its key file here (TASK_AUTHKEY comes first)")

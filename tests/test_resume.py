"""The results file is the memory of a job: what is in it is not run again, and nothing is in it that did not happen."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Farm, Program
from test_losses import RESULTS, TASKS, Peer, join_outcomes

from task_master import ResultsFile, TaskMaster

FUNCTIONS = """
import os, time

def note(n):
    descriptor = os.open("started.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{n}\\n".encode())
    os.close(descriptor)

def double(n):
    note(n)
    if n % 10 == 7 and not os.path.exists("mended"):
        raise ValueError(n)
    return 2 * n

def slow(n):
    note(n)
    time.sleep(0.001)
    return 2 * n
"""
COUNT = 200
BAD = [n for n in range(COUNT) if n % 10 == 7]


@pytest.fixture
def farm(farm: Farm) -> Iterator[Farm]:
    (farm.folder / "resume.py").write_text(FUNCTIONS)
    yield farm
    for program in farm.programs:
        if program.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                program.process.stdin.close()


def run(farm: Farm, *options: object, function: str = "double", **more: Any) -> Program:
    """Run a job of this module with a local worker; returns the master, which may still run."""
    where = ("--results", "results.jsonl", "--workers", 1, "--function", f"resume:{function}")
    return farm.master(*where, *options, **more)


def resume(farm: Farm, *options: object, **more: Any) -> Program:
    """A master that resumes a job in which nothing is left to do, or that is to be refused."""
    return farm.master("--results", "results.jsonl", "--resume", *options, **more)


def results(farm: Farm) -> Path:
    return farm.folder / "results.jsonl"


def started(farm: Farm) -> list[int]:
    """What the function was called with since this was asked last."""
    path = farm.folder / "started.log"
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return sorted(map(int, text.split()))


def check_complete(farm: Farm, count: int = COUNT) -> None:
    records = farm.records()
    assert sorted(record["id"] for record in records) == list(range(count))
    assert all(record["task"] == record["id"] and record["result"] == 2 * record["id"] for record in records)


def start_half(farm: Farm, *options: object) -> None:
    """A job that ended with failed tasks."""
    assert run(farm, *options).wait() == 1
    assert started(farm) == list(range(COUNT))
    assert sorted(record["id"] for record in farm.records() if "error" in record) == BAD


def give_input(farm: Farm, kind: str, tasks: list[Any]) -> tuple[list[object], dict[str, Any]]:
    """The options, and those of the process, that give tasks as arguments, as a file or as a stream."""
    if kind == "arguments":
        return [json.dumps(task) for task in tasks], {}
    path = farm.write_tasks(tasks)
    if kind == "file":
        return ["--tasks", "tasks.jsonl"], {}
    return ["--tasks", "-"], {"stdin": path.open("rb")}


@pytest.mark.parametrize("kind", ["arguments", "file", "stream"])
def test_resuming_runs_only_what_failed(farm: Farm, kind: str) -> None:
    for mended in (False, True):
        options, more = give_input(farm, kind, list(range(COUNT)))
        if mended:
            (farm.folder / "mended").touch()
        master = run(farm, *options, *["--resume"] * mended, **more)
        if "stdin" in more:
            more["stdin"].close()
        assert master.wait() == (0 if mended else 1)
        assert started(farm) == (BAD if mended else list(range(COUNT)))
    check_complete(farm)


def test_resuming_a_finished_job_runs_nothing_and_leaves_the_file_as_it_is(farm: Farm) -> None:
    (farm.folder / "mended").touch()
    farm.write_tasks(list(range(COUNT)))
    assert run(farm, "--tasks", "tasks.jsonl").wait() == 0
    before, _ = results(farm).read_bytes(), started(farm)
    assert resume(farm, "--tasks", "tasks.jsonl").wait() == 0
    assert (results(farm).read_bytes(), started(farm)) == (before, [])


def test_resuming_without_a_results_file_begins_one(farm: Farm) -> None:
    farm.write_tasks(list(range(COUNT)))
    (farm.folder / "mended").touch()
    assert run(farm, "--tasks", "tasks.jsonl", "--resume").wait() == 0
    check_complete(farm)


def test_a_results_file_that_is_not_empty_is_refused_without_resume(farm: Farm) -> None:
    results(farm).write_text("precious\n")
    master = run(farm, "1")
    assert master.wait() == 2
    assert len(master.stderr) == 1 and "results.jsonl" in master.stderr[0] and "--resume" in master.stderr[0]
    assert results(farm).read_text() == "precious\n"


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_is_dropped_and_its_task_run_again(farm: Farm, cut: int) -> None:
    (farm.folder / "mended").touch()
    farm.write_tasks(list(range(20)))
    assert run(farm, "--tasks", "tasks.jsonl").wait() == 0
    started(farm)
    torn = json.loads(results(farm).read_text().splitlines()[-1])["id"]
    os.truncate(results(farm), results(farm).stat().st_size - cut)
    assert run(farm, "--tasks", "tasks.jsonl", "--resume").wait() == 0
    assert started(farm) == [torn]
    check_complete(farm, 20)


def test_a_file_torn_at_every_byte_of_its_last_line_is_resumed(farm: Farm) -> None:
    """In one process: the file alone matters."""
    code = (
        "import sys, task_master\n"
        "whole = open('whole', 'rb').read()\n"
        "for size in range(whole.rindex(b'\\n', 0, -1) + 1, len(whole) + 1):\n"
        "    open('torn', 'wb').write(whole[:size])\n"
        "    results = task_master.ResultsFile('torn', True)\n"
        "    results.write([])\n"
        "    results.close()\n"
        "    expected = whole if size == len(whole) else whole[:whole.rindex(b'\\n', 0, -1) + 1]\n"
        "    assert open('torn', 'rb').read() == expected, size\n"
    )
    line = '{"id": %d, "task": "\\u00fc \\ud83d", "result": [%d], "seconds": 0.1, "worker": "host/1", "attempts": 1}\n'
    (farm.folder / "whole").write_text("".join(line % (n, n) for n in range(3)))
    check = subprocess.run(
        [sys.executable, "-c", code], cwd=farm.folder, env=farm.env(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("line", ["not a record", "[]", "{}", '{"id": "x", "task": 1, "result": 1}', "", "\0" * 100])
def test_a_line_that_is_no_record_is_refused_and_named(farm: Farm, line: str) -> None:
    farm.write_tasks(list(range(3)))
    good = '{"id": 0, "task": 0, "result": 0, "seconds": 0.1, "worker": "host/1", "attempts": 1}\n'
    content = good + line + "\n" + good.replace("0,", "1,")
    results(farm).write_text(content)
    master = resume(farm, "--tasks", "tasks.jsonl")
    assert master.wait() == 2
    assert "line 2" in master.stderr[-1] and "results.jsonl" in master.stderr[-1]
    assert results(farm).read_text() == content


@pytest.mark.parametrize("kind", ["arguments", "file", "stream"])
def test_an_input_whose_tasks_differ_is_refused_naming_the_first_that_does(farm: Farm, kind: str) -> None:
    options, more = give_input(farm, kind, list(range(COUNT)))
    assert run(farm, *options, **more).wait() == 1
    before, _ = results(farm).read_bytes(), started(farm)
    changed = list(range(COUNT))
    changed[12] = 1200
    changed[13] = 1300
    options, more2 = give_input(farm, kind, changed)
    master = resume(farm, *options, **more2)
    for stream in (more, more2):
        if "stdin" in stream:
            stream["stdin"].close()
    assert master.wait(10) == 2, "nobody needs to finish anything first"
    assert "results.jsonl" in master.stderr[-1] and "1200" in master.stderr[-1]
    assert kind == "arguments" or "line 13" in master.stderr[-1]
    if kind != "stream":  # which is read as it comes, when those before may have been run again
        assert results(farm).read_bytes() == before, "a refused file is not touched"


def test_blank_lines_take_no_id_and_the_named_line_is_that_of_the_file(farm: Farm) -> None:
    (farm.folder / "mended").touch()
    (farm.folder / "tasks.jsonl").write_text("\n0\n\n\n1\n  \n2\n")
    assert run(farm, "--tasks", "tasks.jsonl").wait() == 0
    started(farm)
    (farm.folder / "tasks.jsonl").write_text("0\n\n1\n\n\n5\n")
    master = resume(farm, "--tasks", "tasks.jsonl")
    assert master.wait() == 2
    assert "line 6" in master.stderr[-1]
    (farm.folder / "tasks.jsonl").write_text("0\n1\n\n 2 \n")
    assert resume(farm, "--tasks", "tasks.jsonl").wait() == 0
    assert started(farm) == []


def test_an_input_that_lost_its_last_tasks_is_refused(farm: Farm) -> None:
    farm.write_tasks(list(range(COUNT)))
    start_half(farm, "--tasks", "tasks.jsonl")
    farm.write_tasks(list(range(COUNT - 5)))
    master = resume(farm, "--tasks", "tasks.jsonl")
    assert master.wait() == 2
    assert "results.jsonl" in master.stderr[-1]


def test_an_input_that_has_grown_is_resumed_with_what_is_new(farm: Farm) -> None:
    (farm.folder / "mended").touch()
    farm.write_tasks(list(range(10)))
    assert run(farm, "--tasks", "tasks.jsonl").wait() == 0
    started(farm)
    farm.write_tasks(list(range(25)))
    assert run(farm, "--tasks", "tasks.jsonl", "--resume").wait() == 0
    assert started(farm) == list(range(10, 25))
    check_complete(farm, 25)


def test_tasks_written_another_way_are_the_same_tasks(farm: Farm) -> None:
    (farm.folder / "echo.py").write_text("def same(task):\n    return task\n")
    where = ("--tasks", "tasks.jsonl", "--results", "results.jsonl", "--workers", 1, "--function", "echo:same")
    (farm.folder / "tasks.jsonl").write_text('{"a": 1, "b": [1.0, "\\u00fc"]}\n"x"\n')
    assert farm.master(*where).wait() == 0
    (farm.folder / "tasks.jsonl").write_bytes('  {"b":[1.0,"ü"],"a":1}\r\n"\\u0078"'.encode())
    assert resume(farm, "--tasks", "tasks.jsonl").wait() == 0
    assert len(farm.records()) == 2


def test_a_second_master_on_the_same_file_is_refused_and_the_first_goes_on(farm: Farm) -> None:
    farm.write_tasks(list(range(COUNT)))
    options = ("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    first = farm.master(*options)
    first.port()
    (farm.folder / "link.jsonl").symlink_to("results.jsonl")
    for name in ("results.jsonl", "link.jsonl"):
        for resume in ([], ["--resume"]):
            second = farm.master("--tasks", "tasks.jsonl", "--results", name, *resume)
            assert second.wait() == 2
            assert "another master" in second.stderr[-1] and len(second.stderr) == 1
    (farm.folder / "mended").touch()
    farm.worker(first, "--function", "resume:double")
    assert first.wait() == 0
    check_complete(farm)


def test_a_second_master_is_refused_while_the_first_resumes(farm: Farm) -> None:
    """Resuming puts a new file in the place of the old one, at its first record: the lock must go with it."""
    farm.write_tasks(list(range(COUNT)))
    start_half(farm, "--tasks", "tasks.jsonl")
    options = ("--tasks", "tasks.jsonl", "--results", "results.jsonl", "--resume")
    first = farm.master(*options)
    peer = Peer(farm, first.port())
    run_id = peer.join()
    for n in BAD[:2]:
        assert farm.master(*options).wait() == 2
        assert peer.call(TASKS, "lease", 1, 20.0) == f"{n} {n}"
        peer.report(run_id, f'{n} "result": {2 * n}, "seconds": 0.0')
    assert farm.master(*options).wait() == 2
    peer.close()
    (farm.folder / "mended").touch()
    farm.worker(first, "--function", "resume:double")
    assert first.wait() == 0
    check_complete(farm)


def test_a_results_file_behind_a_link_stays_behind_it(farm: Farm) -> None:
    farm.write_tasks(list(range(COUNT)))
    (farm.folder / "elsewhere").mkdir()
    results(farm).symlink_to("elsewhere/real.jsonl")
    start_half(farm, "--tasks", "tasks.jsonl")
    os.chmod(results(farm), 0o640)
    (farm.folder / "mended").touch()
    assert run(farm, "--tasks", "tasks.jsonl", "--resume").wait() == 0
    assert results(farm).is_symlink()
    assert (farm.folder / "elsewhere/real.jsonl").stat().st_mode & 0o777 == 0o640
    check_complete(farm)


def test_a_killed_master_loses_no_record_that_it_acknowledged(farm: Farm) -> None:
    """And every task is in the file in the end, once."""
    farm.write_tasks(list(range(COUNT)))
    options = ("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    dice = random.Random(1)
    acknowledged: set[int] = set()
    for attempt in range(4):
        master = farm.master(*options, *["--resume"] * bool(attempt))
        peer = Peer(farm, master.port())
        run_id = peer.join()
        for _ in range(dice.randrange(1, 20)):
            ids = [int(line.split()[0]) for line in peer.call(TASKS, "lease", dice.randrange(1, 6), 0.0).split("\n")]
            assert not acknowledged & set(ids)
            peer.report(run_id, *[f'{n} "result": {2 * n}, "seconds": 0.0' for n in ids])
            acknowledged |= set(ids)
        master.kill()
        peer.close()
        assert {record["id"] for record in farm.records()} == acknowledged
    (farm.folder / "mended").touch()
    assert run(farm, "--tasks", "tasks.jsonl", "--resume").wait() == 0
    assert not acknowledged & set(started(farm))
    check_complete(farm)


def check_refused(peer: Peer, run_id: str, outcomes: str) -> None:
    """A report that is not acknowledged: an error comes back, or the end of the connection."""
    peer.ask(RESULTS, "report", run_id, 0.0, join_outcomes(*outcomes.split("\n")))
    with contextlib.suppress(EOFError, ConnectionError):
        kind, _ = peer.connection.recv()
        assert kind != "#RETURN"


def test_nothing_is_written_behind_a_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a disk is full for a moment, and then a worker is lost: the record of that would spoil the file."""

    class Holder:
        name, enlisted_at = "host/1", None

    results = ResultsFile(str(tmp_path / "results.jsonl"), resume=False)
    master = TaskMaster(authkey=b"x" * 16, redeliveries=0)
    master._sink = results.write
    master.ledger.submit([(0, "1"), (1, "2")])
    reporting, lost = Holder(), Holder()
    for holder in (reporting, lost):
        assert len(master.ledger.lease(holder, 1) or []) == 1
    write = os.write

    def tear(descriptor: int, data: bytes) -> int:
        if descriptor != results._fd:
            return write(descriptor, data)
        monkeypatch.undo()
        write(descriptor, bytes(data)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", tear)
    with pytest.raises(OSError, match="No space"):
        master.report(reporting, [(0, True, '"result": 1, "seconds": 0.500000')], 0.5)
    master.goodbye(lost)
    assert (tmp_path / "results.jsonl").read_bytes() == b'{"id": 0, '


def test_a_full_disk_ends_the_job_without_acknowledging_what_is_not_written(farm: Farm) -> None:
    master = farm.master("1", "2", "--results", "/dev/full")
    peer = Peer(farm, master.port())
    run_id = peer.join()
    peer.call(TASKS, "lease", 1, 0.0)
    check_refused(peer, run_id, '0 "result": 1, "seconds": 0.0')
    check_refused(peer, run_id, '0 "result": 1, "seconds": 0.0')
    peer.close()
    assert master.wait() == 1
    assert "/dev/full" in master.stderr[-1] and "no space left on device" in master.stderr[-1]
    assert not any("Traceback" in line for line in master.stderr)


def test_a_full_disk_at_the_loss_of_a_worker_ends_the_job_with_one_line(farm: Farm) -> None:
    master = farm.master("1", "2", "--results", "/dev/full", "--redeliveries", 0)
    peer = Peer(farm, master.port())
    peer.join()
    peer.call(TASKS, "lease", 1, 0.0)
    peer.close()
    assert master.wait() == 1
    assert "/dev/full" in master.stderr[-1] and "no space left on device" in master.stderr[-1]
    assert not any("Traceback" in line for line in master.stderr), master.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_file_that_may_not_grow_is_resumed_when_it_may_and_repeats_no_record(farm: Farm) -> None:
    import resource

    farm.write_tasks(list(range(COUNT)))
    options = ("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    for limit in (5_000, 10_000):
        master = farm.master(*options, *["--resume"] * (limit > 5_000))
        master.port()
        resource.prlimit(master.pid, resource.RLIMIT_FSIZE, (limit, limit))
        worker = farm.worker(master, "--function", "resume:slow", "--wait", 0.1)
        assert master.wait() == 1
        assert "results.jsonl" in master.stderr[-1] and "too large" in master.stderr[-1]
        worker.kill()
        assert results(farm).stat().st_size <= limit
    started(farm)
    assert run(farm, "--tasks", "tasks.jsonl", "--resume", function="slow").wait() == 0
    check_complete(farm)
    assert len(started(farm)) < COUNT


def test_a_failing_fsync_ends_the_job_with_one_line(farm: Farm) -> None:
    """A disk may tell only then that it could not keep what it took."""
    code = (
        "import errno, os, task_master\n"
        "def fail(descriptor):\n    raise OSError(errno.EIO, os.strerror(errno.EIO))\n"
        "os.fsync = fail\n"
        "raise SystemExit(task_master.main())\n"
    )
    farm.write_tasks(list(range(COUNT)))
    argv = ("--port", "0", "--tasks", "tasks.jsonl", "--results", "results.jsonl", "--workers", "1")
    master = Program([sys.executable, "-c", code, *argv], farm.folder, farm.env(PYTHONPATH=str(ROOT)))
    farm.programs.append(master)
    assert master.wait() == 1
    assert "results.jsonl" in master.stderr[-1] and "input/output error" in master.stderr[-1]
    assert not any("Traceback" in line for line in master.stderr), master.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_went_away_does_not_hang_the_master(farm: Farm, stream: str) -> None:
    """Without a reader of its messages the job is done; without one of its records it ends with status 1."""
    farm.write_tasks(list(range(COUNT)))
    (farm.folder / "mended").touch()
    where = ["--results", "-"] if stream == "stdout" else ["--results", "results.jsonl"]
    options = ["--port", "0", "--tasks", "tasks.jsonl", *where, "--workers", "1", "--function", "resume:double"]
    ours, theirs = os.pipe()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "task_master.py"), *options], cwd=farm.folder, env=farm.env(), **streams
    ) as master:
        os.close(theirs)
        os.close(ours)
        try:
            assert master.wait(20) == (1 if stream == "stdout" else 0)
        finally:
            master.kill()
    if stream == "stderr":
        check_complete(farm)


def test_memory_for_a_resumed_job_is_at_most_sixteen_bytes_a_record(farm: Farm) -> None:
    code = (
        "import sys, tracemalloc, task_master\n"
        "tracemalloc.start()\n"
        "results = task_master.ResultsFile('results.jsonl', True)\n"
        "print(tracemalloc.get_traced_memory()[0])\n"
        "results.close()\n"
    )
    count = 30_000
    line = '{"id": %d, "task": %d, "result": 1, "seconds": 0.1, "worker": "host/1", "attempts": 1}\n'
    results(farm).write_text("".join(line % (n, n) for n in range(count)))
    check = subprocess.run(
        [sys.executable, "-c", code], cwd=farm.folder, env=farm.env(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
    assert int(check.stdout) < 16 * count + 200_000

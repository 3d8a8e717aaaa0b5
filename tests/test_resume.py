"""The results file is the memory of a job: what is in it is not run again, and nothing is in it that did not happen."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import stat
import tracemalloc
from typing import Any

import pytest
from lab import REPORT, RESULTS, Farm, Program, check_said, check_silence, join_outcomes, ok

from task_master import ResultsFile

COUNT = 200
BAD = [n for n in range(COUNT) if n % 10 == 7]
JOB = ["--tasks", "tasks.jsonl", "--results", "results.jsonl"]
WORK = ["--workers", 1, "--function", "functions:mendable"]


@pytest.fixture(autouse=True)
def tasks(farm: Farm) -> None:
    farm.write_tasks(range(COUNT))


def run(farm: Farm, *options: object) -> Program:
    """A job with a local worker; returns the master, which may still run."""
    return farm.master(*JOB, *WORK, *options)


def resume(farm: Farm, *options: object, **more: Any) -> Program:
    """A master that resumes a job in which nothing is left to do, or that is to be refused."""
    return farm.master(*JOB[2:], "--resume", *(options or JOB[:2]), **more)


def started(farm: Farm) -> list[int]:
    """What the function was called with since this was asked last."""
    ids = sorted(map(int, farm.started()))
    (farm.folder / "started.log").unlink(missing_ok=True)
    return ids


def run_half(farm: Farm) -> None:
    """A job that ended with failed tasks."""
    assert run(farm).wait() == 1
    assert started(farm) == list(range(COUNT))
    assert sorted(record["id"] for record in farm.records() if "error" in record) == BAD


def check_refused(master: Program, *words: str) -> None:
    """It was refused in one line that says all of these."""
    assert master.wait() == 2
    assert len(master.said("task_master: (?!listening|resuming)")) == 1, master.stderr
    assert all(word in master.stderr[-1] for word in words), master.stderr


def give_input(farm: Farm, kind: str, tasks: list[Any]) -> tuple[list[object], dict[str, Any]]:
    """The options, and those of the process, that give tasks in one of these ways."""
    if kind == "arguments":
        return ["--", *map(json.dumps, tasks)], {}
    path = farm.write_tasks(tasks)
    return (JOB[:2], {}) if kind == "file" else (["--tasks", "-"], {"stdin": farm.closing(path.open("rb"))})


@pytest.mark.parametrize("kind", ["arguments", "file", "stream"])
def test_resuming_runs_only_what_failed_and_an_input_that_differs_is_refused_by_its_first_task(farm: Farm, kind: str) -> None:
    run_half(farm)
    before = farm.results.read_bytes()
    for tasks, words in (([*range(12), 1200, 1300, *range(14, COUNT)], ("task 12 ", "1200")), ([*range(COUNT - 5)], ("195",))):
        options, more = give_input(farm, kind, tasks)
        check_refused(resume(farm, *options, **more), "results.jsonl", *words)
        assert farm.results.read_bytes() == before
    farm.mend()
    options, more = give_input(farm, kind, list(range(COUNT)))
    master = resume(farm, *WORK, *options, **more)
    assert master.wait() == 0
    assert started(farm) == BAD
    farm.check_doubled(COUNT)
    to_do = "" if kind == "stream" else ", 20 to do"  # a stream is compared as it comes
    assert f"task_master: resuming results.jsonl: 180 done are kept, 20 failed are repeated{to_do}" in master.stderr
    assert "200 done, 0 failed" in master.stderr[-1] and "180 kept from before" in master.stderr[-1]


def test_resuming_a_finished_job_runs_nothing_but_what_is_new_and_leaves_the_file_as_it_is(farm: Farm) -> None:
    farm.mend()
    master = run(farm, "--resume")
    assert master.wait() == 0
    assert master.said("resuming results.jsonl: it has no records yet")
    assert started(farm) == list(range(COUNT))
    before = farm.results.read_bytes(), farm.results.stat().st_ino
    assert resume(farm).wait() == 0
    assert (farm.results.read_bytes(), farm.results.stat().st_ino) == before
    farm.write_tasks(range(COUNT + 25))  # the input has grown
    master = run(farm, "--resume")
    assert master.wait() == 0
    assert started(farm) == list(range(COUNT, COUNT + 25))
    farm.check_doubled(COUNT + 25)
    assert master.said("resuming results.jsonl: 200 done are kept, 0 failed are repeated, 25 to do$")


def test_tasks_written_another_way_are_the_same_tasks_and_blank_lines_take_no_id(farm: Farm) -> None:
    farm.write("tasks.jsonl", '{"a": 1, "b": [1.0, 1e5, "\\u00fc"]}\n\n"x"\n')
    farm.run_job(*JOB[:2], function="functions:same")
    farm.write("tasks.jsonl", ' \n  {"b":[1,100000,"ü"],"a":1}\r\n"\\u0078"')
    assert resume(farm).wait() == 0
    assert len(farm.records()) == 2
    farm.write("tasks.jsonl", '{"b":[1.0,1e5,"ü"],"a":1}\n\n"y"')
    check_refused(resume(farm), "task 1 ", '"y"')


LINE = '{"id": %d, "task": "\\u00fc \\ud83d", "result": {"n": [%d]}, "seconds": 0.1, "worker": "host/1", "attempts": 1}\n'


def test_a_file_torn_at_any_byte_of_its_last_line_is_whole_lines_again(farm: Farm) -> None:
    whole, path = "".join(LINE % (n, n) for n in range(3)).encode(), farm.folder / "torn"
    begin = whole.rindex(b"\n", 0, -1) + 1
    for size in range(begin, len(whole) + 1):
        path.write_bytes(whole[:size])
        ResultsFile(str(path), True).finish(False)
        assert path.read_bytes() == (whole if size >= len(whole) - 1 else whole[:begin])


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("torn", ['{"i', '{"id": 1', '{"id": 1, "task": "', '{"id": 7, "task": "'])
def test_a_line_that_a_full_disk_has_torn_spoils_no_other(farm: Farm, torn: str, ordered: bool) -> None:
    whole = "".join(LINE % (n, n) for n in (2, 1, 0))
    path = farm.write("torn", LINE.replace("result", "error") % (0, 0) + whole)
    file = ResultsFile(str(path), True)
    with path.open("a") as end:
        end.write(torn)
    file.finish(ordered)
    lines = path.read_text().splitlines(keepends=True)
    assert [line for line in lines if line != torn] == sorted(whole.splitlines(keepends=True), reverse=not ordered)


def test_a_second_master_on_the_same_file_is_refused_and_the_first_goes_on(farm: Farm) -> None:
    first = farm.master(*JOB)
    first.port()
    (farm.folder / "link.jsonl").symlink_to("results.jsonl")
    for name in ("results.jsonl", "link.jsonl"):
        for options in ([], ["--resume"]):
            check_refused(farm.master(*JOB[:2], "--results", name, *options), "another master")
    farm.mend()
    farm.worker(first, *WORK[2:])
    assert first.wait() == 0
    farm.check_doubled(COUNT)


def test_a_killed_master_loses_no_record_that_it_acknowledged(farm: Farm) -> None:
    dice = random.Random(1)
    acknowledged: set[int] = set()
    for _ in range(4):
        master = farm.master(*JOB, "--resume")  # which begins a file where there is none
        peer = farm.peer(master).join()
        for _ in range(dice.randrange(1, 20)):
            ids = peer.lease_ids(dice.randrange(1, 6))
            assert not acknowledged & set(ids)
            peer.report(*[ok(n, 2 * n) for n in ids])
            acknowledged |= set(ids)
        master.kill()
        assert {record["id"] for record in farm.records()} == acknowledged
    farm.mend()
    assert run(farm, "--resume").wait() == 0
    assert not acknowledged & set(started(farm))
    farm.check_doubled(COUNT)


def start_repeating(farm: Farm, code: str = "") -> tuple[Program, bytes]:
    """A master that resumes a job with failed tasks, and what the file was before."""
    run_half(farm)
    farm.mend()
    before = farm.results.read_bytes()
    master = farm.altered_master(code, *JOB, "--resume")
    master.port()
    return master, before


TELL = """
open_file = os.open
def tell(path, flags, mode=0o777, **more):
    if 'results.jsonl.' in str(path) and flags & os.O_EXCL and mode == 0o600:
        print(path, 'is new and private', flush=True)
    return open_file(path, flags, mode, **more)
os.open = tell
"""


@pytest.mark.parametrize(("end", "status"), [(0, 0), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_resumed_job_only_appends_and_drops_superseded_lines_when_it_ends_or_drains(farm: Farm, end: int, status: int) -> None:
    master, before = start_repeating(farm, TELL)
    peer = farm.peer(master).join()
    repeated, left = (BAD[:1], BAD[1:]) if end else (BAD, [])
    for n in repeated:
        assert peer.lease_ids() == [n]
        assert farm.results.read_bytes().startswith(before)
        peer.report(ok(n, 2 * n))
    master.signal(end)
    assert master.wait() == status
    after = farm.results.read_bytes()
    if end == signal.SIGKILL:
        assert after.startswith(before)
        assert len(farm.records()) == COUNT + 1
    else:
        kept = [line for line in before.splitlines() if b'"error"' not in line]
        assert [line for line in after.splitlines() if b'"error"' not in line][: len(kept)] == kept
        farm.check_once(COUNT)
        assert sorted(record["id"] for record in farm.records() if "error" in record) == left
        assert re.search(r"results\.jsonl\.[0-9a-f]{8,} is new and private$", *master.stdout)
    assert [path.name for path in farm.folder.glob("results*")] == ["results.jsonl"]
    assert run(farm, "--resume").wait() == 0
    assert started(farm) == left
    farm.check_doubled(COUNT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_that_was_put_right_has_its_mode_and_owner_and_stays_behind_its_link(farm: Farm) -> None:
    real = farm.folder / "elsewhere/real.jsonl"
    real.parent.mkdir()
    farm.results.symlink_to("elsewhere/real.jsonl")
    run_half(farm)
    os.chown(real, 12345, 23456)
    real.chmod(0o664)
    farm.write("treasure", "precious")
    (farm.folder / "elsewhere/real.jsonl.new").symlink_to("../treasure")  # a name that could be guessed
    farm.mend()
    assert run(farm, "--resume").wait() == 0
    after = real.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (12345, 23456, 0o664)
    assert farm.results.is_symlink() and (farm.folder / "treasure").read_text() == "precious"
    assert sorted(os.listdir(farm.folder / "elsewhere")) == ["real.jsonl", "real.jsonl.new"]
    farm.check_doubled(COUNT)


@pytest.mark.parametrize(("function", "status"), [("chmod", 0), ("replace", 1)])
def test_a_file_that_cannot_be_put_right_is_one_line_and_the_status_is_as_without(farm: Farm, function: str, status: int) -> None:
    fail = f"def fail(*args):\n    raise OSError(errno.EPERM, os.strerror(errno.EPERM))\nos.{function} = fail\n"
    master, before = start_repeating(farm, fail)
    if status:
        (farm.folder / "mended").unlink()
    farm.worker(master, *WORK[2:])
    assert master.wait() == status
    assert len(master.said("cannot rewrite results.jsonl: operation not permitted")) == 1
    check_silence(master)
    assert farm.results.read_bytes().startswith(before)
    assert [path.name for path in farm.folder.glob("results*")] == ["results.jsonl"]
    farm.mend()
    assert run(farm, "--resume").wait() == 0
    farm.check_doubled(COUNT)


TEAR = """
write, torn = os.write, []
def tear(descriptor, data):
    if not bytes(data).startswith(b'{"id": ') or torn:
        return write(descriptor, data)
    torn.append(write(descriptor, bytes(data)[:10]))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.write = tear
"""


def test_nothing_is_written_behind_a_torn_line(farm: Farm) -> None:
    """As when a disk is full for a moment, and then a worker is lost: the record of that would spoil the file."""
    master = farm.altered_master(TEAR, *JOB, "--redeliveries", 0)
    reporting, lost = farm.peer(master).join(), farm.peer(master).join()
    assert [peer.lease_ids() for peer in (reporting, lost)] == [[0], [1]]
    assert reporting.try_call(RESULTS, REPORT, reporting.run_id, 0.0, join_outcomes(ok(0, 0))) != "#RETURN"
    lost.close()
    assert master.wait() == 1
    *lines, _ = farm.results.read_bytes().split(b"\n")
    assert [json.loads(line)["id"] for line in lines] in ([], [1])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("how", ["report", "loss"])
def test_a_full_disk_ends_the_job_without_acknowledging_what_is_not_written(farm: Farm, how: str) -> None:
    master = farm.master("1", "2", "--results", "/dev/full", "--redeliveries", 0)
    peer = farm.peer(master).join()
    assert peer.lease_ids() == [0]
    if how == "report":
        assert peer.try_call(RESULTS, REPORT, peer.run_id, 0.0, join_outcomes(ok(0, 0))) != "#RETURN"
    peer.close()
    line = check_said(master, 1, "^task_master: ", "/dev/full", "writ.*no space left on device")
    assert line == master.stderr[-1] and len(line) < 300


@pytest.mark.parametrize("options", [[], ["--ordered"]], ids=["as they come", "ordered"])
def test_a_file_that_may_not_grow_is_resumed_when_it_may_and_repeats_no_record(farm: Farm, options: list[str]) -> None:
    for limit, more in ((5_000, []), (10_000, ["--resume"])):
        master = farm.master(*JOB, *options, *more)
        master.port()
        resource.prlimit(master.pid, resource.RLIMIT_FSIZE, (limit, limit))
        worker = farm.worker(master, "--function", "functions:work", "--wait", 0.1)
        assert master.wait() == 1
        assert "results.jsonl" in master.stderr[-1] and "too large" in master.stderr[-1]
        check_silence(master)
        worker.kill()
        *lines, _ = farm.results.read_bytes().split(b"\n")  # the last one may be torn
        records = [*map(json.loads, lines)]  # not of the first tasks: what stands behind a slow one may come later
        assert len({record["id"] for record in records}) == len([r for r in records if r["result"] == 2 * r["id"]]) == len(lines)
        assert farm.results.stat().st_size <= limit
    started(farm)
    assert run(farm, *options, "--resume", "--function", "functions:work").wait() == 0
    farm.check_doubled(COUNT)
    assert len(started(farm)) == COUNT - len(lines)


def test_a_failing_fsync_ends_the_job_with_one_line(farm: Farm) -> None:
    """A disk may tell only then that it could not keep what it took."""
    fail = "def fail(descriptor):\n    raise OSError(errno.EIO, os.strerror(errno.EIO))\nos.fsync = fail"
    master = farm.altered_master(fail, *JOB, "--workers", 1)
    assert master.wait() == 1
    assert "results.jsonl" in master.stderr[-1] and "input/output error" in master.stderr[-1]
    check_silence(master)


def test_memory_for_a_resumed_job_is_at_most_twenty_four_bytes_a_record(farm: Farm) -> None:
    count = 30_000
    line = '{"id": %d, "task": %d, "result": 1, "seconds": 0.1, "worker": "host/1", "attempts": 1}\n'
    farm.write("results.jsonl", "".join(line % (n, n) for n in range(count)))
    tracemalloc.start()
    resumed = ResultsFile(str(farm.results), True)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    resumed.finish(False)
    assert resumed.kept == count
    assert used < 24 * count + 200_000

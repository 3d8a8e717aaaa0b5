"""What the master writes: whole, to whatever stands there, or the job says that it could not; one line for each record."""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from lab import ROOT, Farm, Program, check_said

from task_master import ResultsFile

PIPE = "os.set_blocking(1, False); fcntl.fcntl(1, 1031, 4096)"  # F_SETPIPE_SZ: no record fits
LIMITED = (
    "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); os.dup2(os.open('out', os.O_WRONLY | os.O_CREAT), 1)"
)
BROKEN = {
    "no space left on device": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
    "too large": LIMITED,
    "broken pipe": "r, w = os.pipe(); os.dup2(w, 1); os.close(r)",
}
each_form = pytest.mark.parametrize("form", ["records", "lines"])


def stuff(n: int) -> str:
    return f"{n}:" + "x" * 20_000


def start_after(farm: Farm, code: str, form: str) -> Program:
    """A master with a worker and 30 tasks, in whose own process `code` has run before."""
    options = [*["--results", "-"] * (form == "records"), *range(30)]
    master = farm.run_after(code, "task_master.py", "--port", 0, *options)
    farm.write("mine.py", inspect.getsource(stuff))
    farm.worker(master, "--function", "mine:stuff", "--wait", 0.1)
    return master


@pytest.mark.skipif(sys.platform != "linux", reason="sizes of pipes and /dev/full are of Linux")
@each_form
def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything(farm: Farm, form: str) -> None:
    master = start_after(farm, PIPE, form)
    assert master.wait() == 0, master.stderr
    if form == "records":
        texts = [json.loads(line)["result"] for line in master.stdout]
    else:
        assert len([line for line in master.stdout if line.startswith("Put task ")]) == 30
        texts = [line[len("Result: ") :] for line in master.stdout if line.startswith("Result: ")]
    assert sorted(texts) == sorted(map(stuff, range(30)))


@pytest.mark.skipif(sys.platform != "linux", reason="sizes of pipes and /dev/full are of Linux")
@each_form
@pytest.mark.parametrize("why", BROKEN)
def test_what_cannot_be_written_to_standard_output_is_said_and_not_counted(farm: Farm, form: str, why: str) -> None:
    master = start_after(farm, BROKEN[why], form)
    check_said(master, 1, "standard output", why)
    written = (farm.folder / "out").read_bytes().split(b"\n")[:-1] if why == "too large" else []
    counted = [int(line.split()[1]) for line in master.said(r"^task_master: \d+ done, ")]
    assert max(counted, default=0) <= len([line for line in written if line.startswith((b"{", b"Result:"))])


@pytest.mark.skipif(not shutil.which("bash") or not os.path.exists("/dev/stdout"), reason="needs bash and /dev/stdout")
def test_a_task_does_not_overrun_its_time_while_its_worker_waits_for_a_slow_disk(farm: Farm) -> None:
    farm.write("big.py", "import time\n\ndef work(n):\n    time.sleep(0.01)\n    return 'x' * 6_000_000 if n % 40 == 0 else n\n")
    os.mkfifo(farm.folder / "fifo")
    options = ("--tasks", farm.write_tasks(range(80)), "--results", "fifo", "--workers", 2, "--timeout", 5)
    master = farm.master(*options, "--function", "big:work")
    with (farm.folder / "fifo").open("rb") as fifo:
        lines = []
        for line in fifo:
            time.sleep(6 * (len(line) > 1_000_000))
            lines.append(line)
    assert master.wait() == 0
    assert sorted(json.loads(line)["id"] for line in lines) == list(range(80))


def test_what_a_task_prints_is_seen_at_once_and_when_it_is_killed(farm: Farm) -> None:
    body = ["print('epoch', n)", "functions.stay(n)", "print('last')", "os.abort()"]
    farm.write("talk.py", "import functions, os\ndef f(n):\n    " + "\n    ".join(body))
    master = farm.master(1)
    worker = farm.worker(master, "--function", "talk:f", env=farm.env(PYTHONUNBUFFERED=None))
    worker.wait_line("epoch 1", "stdout")
    farm.let_go()
    assert master.wait() == 1
    assert worker.wait() == 0
    assert "last" in worker.stdout


def test_a_task_can_catch_what_its_programs_print(farm: Farm) -> None:
    body = """
    with tempfile.TemporaryFile() as file:
        kept = os.dup(sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.system("echo from a program")
        print("from Python", flush=True)
        os.dup2(kept, 1)
        file.seek(0)
        return file.read().decode()
    """
    farm.write("catch.py", f"import os, sys, tempfile\ndef f(n):{body}")
    farm.run_job(1, function="catch:f")
    assert farm.values() == ["from a program\nfrom Python\n"]


@pytest.mark.parametrize("wrapped", ["io.TextIOWrapper(sys.stdout.buffer)", "codecs.getwriter('utf-8')(sys.stdout.buffer)"])
def test_a_module_may_wrap_the_buffer_of_standard_output(farm: Farm, wrapped: str) -> None:
    farm.write("wraps.py", f"import codecs, io, sys\nsys.stdout = {wrapped}\ndef f(n):\n    print('hello', n)\n    return n\n")
    farm.run_job(1, 2, function="wraps:f")
    assert farm.values() == [1, 2]


def test_python_has_nothing_to_warn_of(farm: Farm) -> None:
    job = farm.run_job(1, 2, function="functions:double", env=farm.env(PYTHONDEVMODE="1"))
    assert not job.said("Warning"), job.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="fifos are of POSIX")
@pytest.mark.parametrize("option", ["--ordered", "--resume"])
def test_a_results_file_that_cannot_be_read_is_refused_before_anybody_reads_it(farm: Farm, option: str) -> None:
    os.mkfifo(farm.folder / "fifo")
    check_said(farm.master("--results", "fifo", option, 1), 2, "--ordered and --resume read the results file, and fifo is none")


@pytest.mark.parametrize("target", [">(cat >out)", "/dev/stdout | cat >out"])
def test_a_results_file_that_is_a_pipe_is_written_like_one(farm: Farm, target: str) -> None:
    command = f"set -o pipefail; {sys.executable} {ROOT / 'task_master.py'} --port 0 --workers 1 3 4 --results {target}; s=$?"
    done = subprocess.run(["bash", "-c", command + "; wait $!; exit $s"], cwd=farm.folder, env=farm.env(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert sorted(record["task"] for record in farm.records("out")) == [3, 4]


TOUCH: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: path.with_name("other").rename(path),
    "moved": lambda path: path.rename(path.with_name("moved")),
    "cut": lambda path: path.write_text(""),
}


@pytest.mark.parametrize("touch", TOUCH)
@pytest.mark.parametrize("when", ["while it runs", "at the end"])
def test_a_results_file_that_is_no_longer_there_is_said_and_no_success(farm: Farm, touch: str, when: str) -> None:
    master = farm.master("--tasks", "-", "--results", farm.results, "--workers", 1, stdin=subprocess.PIPE)
    master.put("1\n")
    farm.wait_records(master, 1)
    farm.write("other", "another's\n")
    TOUCH[touch](farm.results)
    if when == "at the end":
        master.end_input()
    check_said(master, 1, r"results\.jsonl.*(deleted|removed|replaced|moved|gone|no longer|missing)")
    if touch == "replaced":
        assert farm.results.read_text() == "another's\n"


def test_a_results_file_that_grows_while_it_is_looked_at_is_not_cut(farm: Farm) -> None:
    code = "import time\nlook = os.fstat\nos.fstat = lambda fd: (look(fd), time.sleep(0.1))[0]"
    options = ["--results", "results.jsonl", "--workers", 1, "--command", "sleep 0.02; : {}"]
    assert farm.altered_master(code, *options, *range(50)).wait() == 0


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_is_no_other_master(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    number = getattr(errno, name)
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    ResultsFile(str(tmp_path / "results.jsonl"), False).finish(False)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(rf"task_master: cannot lock .*results\.jsonl: {os.strerror(number)}", line, re.IGNORECASE)

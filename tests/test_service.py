"""Workers as services: what both sides say about each other, waiting, several jobs, another version, a missing module."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from lab import ROOT, FalseServer, Farm, check_said, check_silence, free_port, wait_until

RESUMED = ("--tasks", "-", "--results", "results.jsonl", "--resume")


def test_both_sides_say_in_one_line_that_they_are_connected_and_with_whom(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", "1", "2", "3", "4")
    worker = farm.worker(master, "--processes", 3, "--function", "functions:stay")
    worker.wait_line("it runs", "stdout", count=3)
    worker.drain()
    farm.let_go()
    assert worker.wait() == 0
    name = re.escape(worker.name())
    master.wait_line(rf"^task_master: worker {name} disconnected$")
    assert (farm.worker(master, "--function", "functions:stay").wait(), master.wait()) == (0, 0)
    assert len(master.said(rf"^task_master: worker {name} connected$")) == 1
    assert len(master.said(f"worker {name} disconnected")) == 1
    assert worker.said("connected") == [f"task_worker: connected to 127.0.0.1:{master.port()}"]


def test_a_lost_master_is_one_line_while_the_tasks_run_and_so_is_its_return(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", "1", "2")
    options = ("--port", master.port(), "--processes", 2, "--function", "functions:stay")
    worker = farm.run(farm.make_patched(BEAT_INTERVAL=0.2) / "task_worker.py", *options)
    worker.wait_line("it runs", "stdout", count=2)
    master.kill()
    worker.wait_line(rf"^task_worker: lost the master at 127\.0\.0\.1:{master.port()} \(.+\)$")
    farm.let_go()
    again = farm.run("task_master.py", "--port", master.port(), "--results", "results.jsonl", "--resume", "1", "2")
    assert (again.wait(), worker.wait()) == (0, 0)
    kinds = [re.sub(r"^task_worker: (\w+).*", r"\1", line) for line in worker.stderr]
    assert kinds == ["connected", "lost", "connected"], worker.stderr
    assert sorted(record["id"] for record in farm.records()) == [0, 1]


@pytest.mark.parametrize("wait", ["60", "0"])
def test_a_worker_that_waits_for_its_master_says_so_once(farm: Farm, wait: str) -> None:
    server = farm.closing(FalseServer(lambda sock: None))  # which hangs up on everybody
    worker = farm.worker(server.port, "--processes", 2, "--wait", wait)
    wait_until(lambda: server.served > 5, worker)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    waiting, draining = worker.stderr
    assert re.search(rf"^task_worker: waiting for the master at 127\.0\.0\.1:{server.port} \(.+\)$", waiting)
    assert draining.startswith("task_worker: draining")
    assert worker.stdout == ["Connect to server 127.0.0.1...", "worker exit."]


def test_a_worker_that_waits_for_ever_serves_one_master_after_the_other_with_the_code_as_it_is_then(farm: Farm) -> None:
    """Whether it has waited for the first one, or the last one was killed before its job was over."""
    port = free_port()
    worker = farm.worker(port, "--wait", 0, "--processes", 2, "--function", "edited:f")
    for number, text in enumerate(["first", "second", "third"]):
        farm.write("edited.py", f"import functions\ndef f(n):\n    functions.stay(n)\n    return '{text}'\n")
        if not number:
            worker.wait_line(rf"waiting for the master at 127\.0\.0\.1:{port} .*connection refused")
        master = farm.run("task_master.py", "--port", port, *RESUMED, stdin=subprocess.PIPE)
        master.put("".join(f"{n}\n" for n in range(2 * number + 2)))
        worker.wait_line("it runs", "stdout", count=2 * number + 2)  # both processes take part in each job
        farm.let_go()
        farm.wait_records(master, 2 * number + 2)
        if number == 1:
            master.kill()
        else:
            master.end_input()
            assert master.wait() == 0, master.stderr
            worker.wait_line("the job is over; waiting for the next master", count=1 + number // 2)
        (farm.folder / "go").unlink()
        assert [(record["result"], record["worker"]) for record in farm.records()[-2:]] == [(text, worker.name())] * 2
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    kinds = [line.split()[1] for line in worker.said("^task_worker: (?!the function's module was edited)")]
    assert kinds == ["waiting", "connected", "the", "connected", "lost", "connected", "the", "draining:"], worker.stderr
    assert worker.stdout[-1] == "worker exit."


LATE = """
import os, time
TEXT = {text!r}
try:
    os.close(os.open("first", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    while not os.path.exists("go"):
        time.sleep(0.01)

def f(n):
    open(f"ran {{n}}", "w").close()
    while n != 5 and not (os.path.exists("ran 6") and os.path.exists("ran 7")):  # until both processes take part
        time.sleep(0.01)
    return TEXT
"""


def test_a_process_that_was_too_late_for_a_job_does_not_run_the_code_of_then_in_the_next_one(farm: Farm) -> None:
    farm.write("late.py", LATE.format(text="old"))
    master = farm.run("task_master.py", "--port", 0, "--results", "first.jsonl", "5")
    worker = farm.worker(master, "--wait", 0, "--processes", 2, "--function", "late:f")
    assert master.wait() == 0
    worker.wait_line("the job is over")
    farm.write("late.py", LATE.format(text="newer"))
    farm.let_go()
    farm.run("task_master.py", "--port", master.port(), "--results", "second.jsonl", "6", "7").wait()
    assert [record["result"] for record in farm.records("second.jsonl")] == ["newer", "newer"]


@pytest.mark.parametrize("version", [0, 99])
def test_a_worker_of_another_version_takes_no_task_and_its_master_says_so_too(farm: Farm, version: int) -> None:
    master = farm.master("--results", "results.jsonl", "--redeliveries", 0, "3")
    other = farm.run(farm.make_patched(PROTOCOL=version) / "task_worker.py", "--port", master.port(), "--processes", 3)
    assert other.wait() == 3
    assert len(other.said(rf"the master at 127\.0\.0\.1:{master.port()} speaks protocol \d+, this worker {version}: copy ")) == 1
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)  # it goes on with those of its own version
    assert [record["result"] for record in farm.records()] == ["3 * 3 = 9"]
    told, counted = master.said(rf": it speaks protocol {version}, this master \d+: copy task_worker\.py")
    assert "refused a connection from " in told and re.search("refused [1-3] connections? from ", counted)
    check_silence(other, master)


def test_a_function_that_one_host_has_does_the_job_there_and_the_other_says_where_it_was_looked_for(farm: Farm) -> None:
    complete, bare = farm.folder / "complete", farm.folder / "bare host"
    for host in (complete, bare):
        host.mkdir()
    farm.write("complete/mailer.py", "import os\ndef send(task): return [task, os.getcwd()]\n")
    master = farm.master("--results", "results.jsonl", *range(20))
    unable = farm.worker(master, "--function", "mailer:send", cwd=bare)
    assert unable.wait() == 2
    (line,) = unable.stderr
    assert line.startswith("task_worker: --function mailer:send: cannot import it on " + socket.gethostname())
    assert all(words in line for words in ("No module named 'mailer'", f"looked in {bare}", sys.executable))
    assert farm.worker(master, "--function", "mailer:send", cwd=complete).wait() == 0
    assert master.wait() == 0
    assert sorted(record["result"] for record in farm.records()) == [[n, os.path.realpath(complete)] for n in range(20)]


WAITS = "import os, time; exec('while not os.path.exists(\"go\"): time.sleep(0.01)')"


def test_a_master_whose_own_worker_cannot_load_the_function_goes_on_with_another(farm: Farm) -> None:
    job = ("--function", "mailer:send", "--workers", 1, "1")
    alone = farm.master(*job)
    check_said(alone, 2, "^task_worker: --function mailer:send: .*No module named 'mailer'")
    assert alone.said(r"no worker is left \(.*: the local worker ended with exit status 2, see standard error\)$")
    complete = farm.folder / "complete"
    complete.mkdir()
    farm.write("complete/mailer.py", f"def send(task):\n    {WAITS}")
    farm.write("mailer.py", f"{WAITS}\nraise ImportError('no licence')\n")
    master = farm.master(*job)
    other = farm.worker(master, "--function", "mailer:send", "--processes", 1, cwd=complete, env=farm.env(PYTHONPATH=None))
    master.wait_line("worker .* connected")
    farm.let_go()
    master.wait_line("cannot import it")
    (complete / "go").touch()
    assert (master.wait(), other.wait()) == (0, 0), master.stderr


def test_a_local_worker_that_could_load_the_function_before_is_started_again(farm: Farm) -> None:
    """The folder of the module may be back in a moment."""
    farm.write("mailer.py", "import os\ndef send(n):\n    if n == 5: os.rename('mailer.py', 'away')\n    return n\n")
    options = ("--workers", 1, "--function", "mailer:send", "--tasks-per-process", 2)
    master = farm.master("--results", "results.jsonl", *options, *range(20))
    master.wait_line("the local worker ended with exit status 2: starting another")
    os.rename(farm.folder / "away", farm.folder / "mailer.py")
    assert master.wait() == 0
    assert sorted(record["result"] for record in farm.records()) == [*range(20)]


SCARCE = """
import errno, task_worker

start, starts = task_worker.Child.__init__, []

def start_or_fail(child, worker):
    starts.append(child)
    if len(starts) in (2, 3):
        raise OSError(errno.EAGAIN, "no process is free")
    start(child, worker)

task_worker.Child.__init__ = start_or_fail
raise SystemExit(task_worker.main())
"""


def test_a_process_that_cannot_be_started_for_a_moment_is_started_later(farm: Farm) -> None:
    farm.write("mod.py", "def f(n):\n    return n\n")
    master = farm.master("--results", "results.jsonl", 1, 2, 3)
    options = ("--port", master.port(), "--processes", 1, "--tasks-per-process", 1, "--function", "mod:f")
    worker = farm.run("-c", SCARCE, *options, env=farm.env(PYTHONPATH=str(ROOT)))
    assert (master.wait(), worker.wait()) == (0, 0), worker.stderr
    assert not worker.said("cannot start")


def test_a_process_whose_module_takes_too_long_to_end_is_killed_and_that_is_said(farm: Farm) -> None:
    farm.write("mod.py", "import atexit, time\natexit.register(time.sleep, 60)\ndef f(n):\n    return n\n")
    master = farm.master("--results", "results.jsonl", 1)
    worker = farm.worker(master, "--function", "mod:f")
    worker.wait_line("a process did not end within 5 s and is killed")
    assert (master.wait(), worker.wait()) == (0, 0)


def test_a_worker_of_another_job_that_looks_in_does_not_keep_one_that_nobody_can_do(farm: Farm) -> None:
    port = free_port()
    service = farm.worker(port, "--wait", 0, "--processes", 4, "--function", "functions:double")
    master = farm.run("task_master.py", "--port", port, "--workers", 1, "--function", "nothing:f", "1")
    assert master.wait() == 2
    service.drain()

"""Workers as services: what both sides say about each other, waiting, several jobs, another version, a missing module."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, Farm, Program

import task_worker

STAY = """
import os, time

def stay(n):
    print("it runs", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.01)
    return n
"""


def lines_like(program: Program, pattern: str) -> list[str]:
    return [line for line in program.stderr if re.search(pattern, line)]


def name_of(worker: Program) -> str:
    return re.escape(f"{socket.gethostname()}/{worker.pid}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# ---- connecting, waiting, losing each other ------------------------------------------------------------------------


def test_both_sides_say_in_one_line_that_they_are_connected_and_with_whom(farm: Farm) -> None:
    (farm.folder / "stay.py").write_text(STAY)
    master = farm.master("--results", "results.jsonl", "1", "2", "3", "4")
    worker = farm.worker(master, "--processes", 3, "--function", "stay:stay")
    worker.wait_line("it runs", "stdout", count=3)
    worker.signal(signal.SIGTERM)
    worker.wait_line("draining")
    (farm.folder / "go").touch()
    assert worker.wait() == 0
    master.wait_line(rf"^task_master: worker {name_of(worker)} disconnected$")
    assert (farm.worker(master, "--function", "stay:stay").wait(), master.wait()) == (0, 0)
    assert len(lines_like(master, rf"^task_master: worker {name_of(worker)} connected$")) == 1
    assert len(lines_like(master, f"worker {name_of(worker)} disconnected")) == 1
    assert lines_like(worker, "connected") == [f"task_worker: connected to 127.0.0.1:{master.port()}"]


def test_a_lost_worker_is_one_line_that_names_it(farm: Farm) -> None:
    (farm.folder / "stay.py").write_text(STAY)
    master = farm.master("1", "2")
    worker = farm.worker(master, "--processes", 2, "--function", "stay:stay")
    worker.wait_line("it runs", "stdout", count=2)
    worker.kill()
    master.wait_line("disconnected|lost$")
    assert len(lines_like(master, rf"worker {name_of(worker)} (disconnected|lost)")) == 1
    assert len(lines_like(master, rf"redelivered since {name_of(worker)} was lost")) in (1, 2)  # a line for each connection


def test_a_lost_master_is_one_line_that_names_it_and_so_is_its_return(farm: Farm) -> None:
    (farm.folder / "stay.py").write_text(STAY)
    master = farm.master("--results", "results.jsonl", "1", "2")
    port = master.port()
    worker = farm.worker(master, "--processes", 2, "--function", "stay:stay")
    worker.wait_line("it runs", "stdout", count=2)
    master.kill()
    (farm.folder / "go").touch()
    worker.wait_line(rf"^task_worker: lost the master at 127\.0\.0\.1:{port} \(.+\)$")
    again = farm.run("task_master.py", "--port", port, "--results", "results.jsonl", "--resume", "1", "2")
    assert (again.wait(), worker.wait()) == (0, 0)
    kinds = [re.sub(r"^task_worker: (\w+).*", r"\1", line) for line in worker.stderr]
    assert kinds == ["connected", "lost", "connected"], worker.stderr
    assert sorted(record["id"] for record in farm.records()) == [0, 1]


OFTEN = "import sys, task_worker; task_worker.BEAT_INTERVAL = 0.2; sys.exit(task_worker.main())"


def test_a_busy_worker_says_that_its_master_is_lost_while_its_task_runs(farm: Farm) -> None:
    (farm.folder / "stay.py").write_text(STAY)
    master = farm.master("1")
    argv = ["--port", master.port(), "--processes", 1, "--function", "stay:stay"]
    worker = farm.run("-c", OFTEN, *argv, env=farm.env(PYTHONPATH=str(ROOT)))  # it beats more often than others
    worker.wait_line("it runs", "stdout")
    master.kill()
    worker.wait_line("lost the master at", timeout=10)
    (farm.folder / "go").touch()


@contextlib.contextmanager
def listen(hang_up_after: int) -> Iterator[tuple[int, threading.Event]]:
    """A port where every caller is hung up on; the event tells that there were so many."""
    enough = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                for count in range(1, 1000):
                    server.accept()[0].close()
                    if count == hang_up_after:
                        enough.set()

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield server.getsockname()[1], enough
        server.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


@pytest.mark.parametrize("wait", ["60", "0"])
def test_a_worker_that_waits_for_its_master_says_so_once(farm: Farm, wait: str) -> None:
    with listen(hang_up_after=6) as (port, enough):
        worker = farm.run("task_worker.py", "--port", port, "--processes", 2, "--wait", wait)
        assert enough.wait(PATIENCE)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    waiting = [rf"^task_worker: waiting for the master at 127\.0\.0\.1:{port} \(.+\)$", "^task_worker: draining"]
    assert len(worker.stderr) == 2, worker.stderr
    assert all(re.search(pattern, line) for pattern, line in zip(waiting, worker.stderr)), worker.stderr
    assert worker.stdout == ["Connect to server 127.0.0.1...", "worker exit."]


def test_a_worker_that_was_started_first_waits_for_its_master(farm: Farm) -> None:
    port = free_port()
    worker = farm.run("task_worker.py", "--port", port, "--processes", 1)
    worker.wait_line(r"waiting for the master at .*connection refused")
    master = farm.run("task_master.py", "--port", port, "3")
    assert (master.wait(), worker.wait()) == (0, 0)


# ---- one worker, several jobs --------------------------------------------------------------------------------------


def test_a_worker_that_waits_for_ever_serves_one_master_after_the_other(farm: Farm) -> None:
    first = farm.master("--results", "first.jsonl", "1")
    worker = farm.worker(first, "--wait", 0, "--processes", 2)
    assert first.wait() == 0
    worker.wait_line("the job is over; waiting for the next master")
    for name in ("second", "third"):
        master = farm.run("task_master.py", "--port", first.port(), "--results", f"{name}.jsonl", "5", "6")
        assert master.wait() == 0, master.stderr
        assert [record["worker"] for record in farm.records(f"{name}.jsonl")] == [f"{socket.gethostname()}/{worker.pid}"] * 2
    worker.wait_line("the job is over", count=3)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    said = [line for line in worker.stderr if "draining" not in line]
    kinds = [next(kind for kind in ("connected to", "the job is over", line) if kind in line) for line in said]
    assert kinds == ["connected to", "the job is over"] * 3
    assert worker.stdout[-1] == "worker exit."


def test_a_worker_that_does_not_wait_for_ever_leaves_with_the_job(farm: Farm) -> None:
    master = farm.master("1")
    worker = farm.worker(master)
    assert (master.wait(), worker.wait()) == (0, 0)
    assert worker.stdout[-1] == "worker exit."


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_however_soon_it_comes(farm: Farm, number: int) -> None:
    (farm.folder / "stay.py").write_text(STAY)
    master = farm.master("--results", "results.jsonl", *range(8))
    workers = [farm.worker(master, "--function", "stay:stay") for _ in range(4)]
    for program in workers:
        program.wait_line("it runs", "stdout")
    for program in [*workers, master]:
        program.signal(number)
        program.wait_line("draining")
        program.signal(number)
    assert [program.wait(15) for program in [*workers, master]] == [128 + number] * 5
    for program in [*workers, master]:
        assert len(lines_like(program, "leaving at once")) == 1
        assert not lines_like(program, "Traceback")


def test_a_child_that_may_not_start_any_more_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_worker.Child, "closed", True)  # as when the worker leaves while a slot begins
    child = task_worker.Child(None, None)
    with pytest.raises(task_worker.ChildDied):
        child.start()
    child.stop()


# ---- another version -----------------------------------------------------------------------------------------------

OTHER_MASTER = "import sys, task_master; task_master.PROTOCOL = 99; sys.exit(task_master.main())"


def write_other_worker(farm: Farm) -> str:
    """A copy of task_worker.py that speaks another protocol."""
    text, count = re.subn(r"^PROTOCOL = \d+", "PROTOCOL = 99", (ROOT / "task_worker.py").read_text(), flags=re.MULTILINE)
    assert count == 1
    (farm.folder / "other_worker.py").write_text(text)
    return str(farm.folder / "other_worker.py")


def test_a_worker_of_another_version_and_its_master_both_say_so(farm: Farm) -> None:
    master = farm.master("3")
    other = farm.run(write_other_worker(farm), "--port", master.port(), "--processes", 3)
    assert other.wait() == 3
    assert len(lines_like(other, rf"the master at 127\.0\.0\.1:{master.port()} speaks protocol \d+, this worker 99: copy ")) == 1
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)  # it goes on with those of its own version
    (line,) = lines_like(master, "speaks protocol")
    assert re.search(rf"worker {name_of(other)} speaks protocol 99, this master \d+: copy task_worker\.py", line)
    assert "Traceback" not in "\n".join(other.stderr + master.stderr)


def test_a_master_of_another_version_and_its_worker_both_say_so(farm: Farm) -> None:
    master = farm.run("-c", OTHER_MASTER, "--port", 0, "3", env=farm.env(PYTHONPATH=str(ROOT)))
    worker = farm.worker(master)
    assert worker.wait() == 3
    assert len(lines_like(worker, r"speaks protocol 99, this worker \d+: copy ")) == 1
    master.wait_line(rf"worker {name_of(worker)} speaks protocol \d+, this master 99: copy task_worker\.py")
    assert master.process.poll() is None


def test_a_worker_of_another_version_takes_no_task(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", "--redeliveries", 0, "3")
    assert farm.run(write_other_worker(farm), "--port", master.port()).wait() == 3
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)
    assert [record["result"] for record in farm.records()] == ["3 * 3 = 9"]


# ---- a function that is not everywhere -----------------------------------------------------------------------------


def make_host(farm: Farm, name: str, **modules: str) -> Any:
    """A folder with some modules, as a host of its own would have it."""
    folder = farm.folder / name
    folder.mkdir()
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return folder


def test_a_missing_module_is_named_with_the_host_and_where_it_was_looked_for(farm: Farm) -> None:
    folder = make_host(farm, "bare host")
    worker = farm.run("task_worker.py", "--port", free_port(), "--function", "mailer:send", cwd=folder)
    assert worker.wait() == 2
    (line,) = worker.stderr
    assert line.startswith("task_worker: --function mailer:send: cannot import it on " + socket.gethostname())
    assert "No module named 'mailer'" in line
    assert str(folder) in line
    assert sys.executable in line


def test_a_module_that_the_functions_module_wants_is_the_one_that_is_named(farm: Farm) -> None:
    folder = make_host(farm, "host", mailer="import no_such_library\ndef send(task): ...\n")
    worker = farm.run("task_worker.py", "--port", free_port(), "--function", "mailer:send", cwd=folder)
    assert worker.wait() == 2
    assert "No module named 'no_such_library'" in worker.stderr[0]
    assert "mailer:send" in worker.stderr[0]


def test_a_function_that_one_host_has_does_the_job_there(farm: Farm) -> None:
    module = "def send(task): return task + 1\n"
    complete, bare = make_host(farm, "complete", mailer=module), make_host(farm, "bare")
    master = farm.master("--results", "results.jsonl", *range(20))
    assert farm.worker(master, "--function", "mailer:send", cwd=bare).wait() == 2
    assert farm.worker(master, "--function", "mailer:send", cwd=complete).wait() == 0
    assert master.wait() == 0
    assert sorted(record["result"] for record in farm.records()) == list(range(1, 21))


def test_a_function_that_fails_on_one_host_names_that_host_in_each_record(farm: Farm) -> None:
    broken = make_host(farm, "broken", mailer="def send(task):\n    import no_such_library\n")
    master = farm.master("--results", "results.jsonl", "1")
    worker = farm.worker(master, "--function", "mailer:send", cwd=broken)
    assert (worker.wait(), master.wait()) == (0, 1)
    (record,) = farm.records()
    assert record["error"]["type"] == "ModuleNotFoundError"
    assert record["worker"] == f"{socket.gethostname()}/{worker.pid}"
    assert str(broken) in record["error"]["traceback"]
    master.wait_line(rf"task 0 failed: ModuleNotFoundError: .*no_such_library.* on {name_of(worker)}")


def test_a_worker_finds_its_function_where_it_was_started(farm: Farm) -> None:
    folder = make_host(farm, "elsewhere", mailer="import os\ndef send(task): return os.getcwd()\n")
    master = farm.master("--results", "results.jsonl", "1")
    assert farm.worker(master, "--function", "mailer:send", cwd=folder).wait() == 0
    assert [json.loads(line)["result"] for line in (farm.folder / "results.jsonl").read_text().splitlines()] == [
        os.path.realpath(folder)
    ]

"""A worker that is lost loses no task: it is run again within a bound, and its late outcome is taken once."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess

import psutil
import pytest
from lab import JOIN, LEASE, PATIENCE, REPORT, SETTINGS, TASKS, Farm, Relay, answer, check_ended, good_answer, ok, wait_until

RESULTS = ("--results", "results.jsonl")


def test_the_time_to_look_for_a_lost_master_begins_when_it_is_lost(farm: Farm) -> None:
    master = farm.master(*RESULTS, "1")
    worker = farm.worker(master, "--function", "functions:stay", "--wait", 3)
    farm.wait_started(worker)
    worker.pause(4)  # of its task, without a word from the master
    master.kill()
    with socket.create_server(("127.0.0.1", master.port())) as server:
        server.settimeout(PATIENCE)
        farm.let_go()
        server.accept()[0].close()


def test_a_lost_worker_is_one_line_and_its_tasks_are_redelivered_and_its_processes_end(any_farm: Farm) -> None:
    master = any_farm.master("1000", "1001", "--results", "results.jsonl")
    victim = any_farm.worker(master, "--processes", 2, "--function", "functions:nap")
    wait_until(lambda: len(any_farm.started()) == 2, victim)
    children = victim.children()
    victim.kill()
    name = re.escape(victim.name())
    master.wait_line(f"worker {name} (disconnected|lost)")
    check_ended(children)
    assert len(master.said(f"worker {name} (disconnected|lost)")) == 1
    told = master.said(rf"redelivered since {name} was lost: task [01] \(attempt 1\)")
    assert len(told) in (1, 2)  # a line for each connection


@pytest.mark.parametrize("cut_first", [True, False])
def test_what_a_drained_worker_finishes_after_its_connection_was_cut_is_reported(farm: Farm, cut_first: bool) -> None:
    master = farm.master(*RESULTS, "1")
    relay = farm.closing(Relay(master.port()))
    worker = farm.worker(relay.port, "--function", "functions:stay")
    farm.wait_started(worker)
    if not cut_first:
        worker.drain()
    relay.cut()
    master.wait_line("redelivered")
    if cut_first:
        worker.drain()
    farm.let_go()
    assert (worker.wait(), master.wait()) == (0, 0)
    assert farm.started() == ["1"]


def test_a_drained_worker_that_cannot_report_says_that_it_lost_its_master(farm: Farm) -> None:
    master = farm.master(*RESULTS, "1")
    worker = farm.worker(master, "--function", "functions:stay")
    farm.wait_started(worker)
    worker.drain()
    master.kill()
    farm.let_go()
    assert worker.wait() == 0
    assert len(worker.said("lost the master at 127.0.0.1")) == 1


@pytest.mark.parametrize("redeliveries", [0, 2])
def test_a_task_whose_workers_are_lost_too_often_is_recorded_as_failed(farm: Farm, redeliveries: int) -> None:
    tasks = farm.write_tasks([*range(30), "guilty", *range(31, 60)])
    farm.run_job("--redeliveries", redeliveries, "--tasks", tasks, function="functions:kill_worker", status=1)
    farm.check_once(60)
    (failed,) = [record for record in farm.records() if "error" in record]
    assert (failed["id"], failed["error"]["type"], failed["attempts"]) == (30, "WorkerLost", redeliveries + 1)
    assert farm.started() == ["guilty"] * (redeliveries + 1)


def test_connections_that_end_while_they_wait_for_tasks_cost_none_its_only_chance(farm: Farm) -> None:
    master = farm.master("--tasks", "-", "--results", "-", "--redeliveries", 0, stdin=subprocess.PIPE)
    good = farm.peer(master).join()
    for n in range(8):
        peers = [farm.peer(master, f"host/{n}").join() for _ in range(3)]
        for peer in peers:
            peer.ask(TASKS, LEASE, 1, 20.0)
        for peer in peers:
            peer.close()
        master.put(f"{n}\n")
        assert wait_until(good.lease, master) == [f"{n} {n}"]
        good.report(ok(n, n))
    good.close()
    master.end_input()
    assert master.wait() == 0
    assert {json.loads(line)["attempts"] for line in master.stdout} == {1}


MOODY = """
import os

with open("loads", "a") as file:
    file.write("x")
if os.path.getsize("loads") == 2:
    raise ConnectionError("the database has too many connections")

def f(n):
    if n == 3:
        os._exit(1)
    return n
"""


def test_a_child_killed_while_it_starts_does_not_end_its_worker(any_farm: Farm) -> None:
    any_farm.write(
        "slow.py",
        "import os, select\nprint('importing', os.getpid(), flush=True)\n"
        "select.select([], [], [], 0 if os.path.exists('go') else 60)\ndef same(n):\n    return n\n",
    )
    master = any_farm.master("1", "2", "--results", "results.jsonl")
    worker = any_farm.worker(master, "--function", "slow:same")
    child = int(worker.wait_line(r"importing (\d+)", "stdout").group(1))
    any_farm.let_go()
    os.kill(child, signal.SIGKILL)
    worker.wait_line("worker exit", "stdout")
    assert master.wait() == 0
    any_farm.check_once(2)


def test_a_module_that_cannot_be_loaded_for_a_moment_does_not_end_the_job(farm: Farm) -> None:
    farm.write("moody.py", MOODY)
    master = farm.run_job("--tasks", farm.write_tasks(range(20)), function="moody:f", status=1)
    assert [record["id"] for record in farm.records() if "error" in record] == [3]
    farm.check_once(20)
    assert len((farm.folder / "loads").read_text()) == 3, master.stderr


def test_an_outcome_of_another_run_is_refused(farm: Farm) -> None:
    master = farm.master("7", *RESULTS)
    peer = farm.peer(master).join()
    peer.run_id = "another"
    peer.report(ok(0, "alien"))
    assert peer.lease() == ["0 7"]
    peer.close()
    farm.worker(master)
    assert master.wait() == 0
    assert [record["result"] for record in farm.records()] == ["7 * 7 = 49"]


@pytest.mark.parametrize("another", [False, True])
def test_what_a_worker_finishes_after_its_connection_was_cut_is_for_the_same_run_alone(farm: Farm, another: bool) -> None:
    master = farm.master('"any"', *RESULTS)
    relay = farm.closing(Relay(master.port()))
    worker = farm.worker(relay.port, "--function", "functions:stay")
    farm.wait_started(worker)
    if another:
        master.kill()
        master = farm.master('"any"', *RESULTS, "--resume")
        relay.target = master.port()
        relay.cut()
    else:
        relay.cut()
        master.wait_line("redelivered since")
    farm.let_go()
    assert (master.wait(), worker.wait()) == (0, 0)
    assert farm.started() == ["any"] * (1 + another)
    assert [record["result"] for record in farm.records()] == ["any"]


@pytest.mark.parametrize("answered", [b"", answer("no", "#ERROR"), answer([], "#ERROR"), answer([0] * 5000)], ids=len)
def test_an_outcome_that_was_not_acknowledged_is_reported_again(farm: Farm, answered: bytes) -> None:
    """Nothing else is an acknowledgement: no error, no long JSON, no answer to another call that comes meanwhile."""
    reports: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def reply(method: str, arguments: list[str]) -> bytes:
        if method != REPORT:
            return good_answer(method)
        reports.put(arguments)
        if not answered:
            raise EOFError
        return answered

    farm.worker(farm.false_master(reply).port)
    seen = [reports.get(timeout=PATIENCE) for _ in range(4)]
    assert {run for run, *_ in seen} == {"r"}
    (ids, outcome), *others = [outcomes.split("\n") for *_, outcomes in seen]
    assert ids == "0" and outcome.startswith('"result"')
    assert all(outcome in lines for lines in others), "whatever else it has done meanwhile"


def test_a_large_report_and_a_large_task_do_not_wait_for_each_other(farm: Farm) -> None:
    """As they would if both ends sent them at the same time, and neither read."""
    farm.write("large.py", "def work(task):\n    return 'x' * (40 << 20) if task == 7 else len(task)\n")
    leases = iter(["0 7", f"1 {json.dumps('y' * (40 << 20))}", None])
    reported: list[str] = []

    def reply(method: str, arguments: list[str]) -> bytes:
        reported.extend(arguments[-1].split("\n")[:1] if method == REPORT else [])
        return answer(next(leases)) if method == LEASE else good_answer(method)

    master = farm.false_master(reply)
    patched = farm.make_patched(REPORT_INTERVAL=60.0) / "task_worker.py"  # so that a report goes with the next lease
    worker = farm.run(patched, "--port", master.port, "--processes", 1, "--function", "large:work")
    assert worker.wait() == 0
    assert (reported, master.served) == (["0", "1"], 1)


def test_the_time_limit_holds_while_the_master_records(farm: Farm) -> None:
    endless = "import os, time\nfrom functions import note\ndef work(n):\n    note(os.getpid())\n    time.sleep(1000 * n)\n"
    farm.write("endless.py", endless)
    leases = iter(["0 0\n1 1", None])
    reports: queue.SimpleQueue[str] = queue.SimpleQueue()

    def reply(method: str, arguments: list[str]) -> bytes:
        if method == REPORT and reports.empty():
            wait_until(lambda: len(farm.started()) == 2 and not psutil.pid_exists(int(farm.started()[1])))
        if method == REPORT:
            reports.put(arguments[-1])
        if method == JOIN:
            return answer({**SETTINGS, "timeout": 0.5})
        return answer(next(leases)) if method == LEASE else good_answer(method)

    master = farm.false_master(reply)
    worker = farm.worker(master.port, "--processes", 1, "--function", "endless:work")
    assert worker.wait() == 0
    assert reports.get().startswith('0\n"result"')
    assert "TimeoutError" in reports.get()


def test_what_has_finished_is_not_lost_with_its_process_while_the_master_answers_another_call(farm: Farm) -> None:
    text = "import os, sys, time, types\ndef work(n):\n    time.sleep(1)\n"  # what is behind it is released
    farm.write("last.py", text + "    sys.stdout = types.SimpleNamespace(flush=lambda: os._exit(1))\n")
    leases, reports = iter(["0 0\n1 1", None]), []

    def reply(method: str, arguments: list[str]) -> bytes:
        if method == "release":
            wait_until(lambda: not worker.children())
        reports.extend(arguments[-1:] if method == REPORT else [])
        return answer(next(leases)) if method == LEASE else good_answer(method)

    worker = farm.worker(farm.false_master(reply).port, "--function", "last:work")
    assert worker.wait() == 0
    assert reports[0].startswith('0\n"result"')


def test_what_finishes_while_a_report_waits_for_its_answer_comes_in_one_report(farm: Farm) -> None:
    leases, reports = iter(["\n".join([f"{n} {n}" for n in range(5)]), None]), []

    def reply(method: str, arguments: list[str]) -> bytes:
        if method == REPORT:
            reports.append(arguments[-1].partition("\n")[0])
            wait_until(lambda: len(farm.started()) == 5)  # the worker looks for what has finished again and again
        return answer(next(leases)) if method == LEASE else good_answer(method)

    farm.write("slow.py", "import time, functions\n\ndef work(n):\n    functions.note(n)\n    time.sleep(0.4)\n    return n\n")
    worker = farm.worker(farm.false_master(reply).port, "--function", "slow:work", "--processes", 1)
    assert worker.wait() == 0
    assert len(reports) <= 3 and " ".join(reports) == "0 1 2 3 4"  # the last task may come by itself


def test_a_worker_hears_that_the_job_is_over_though_its_process_takes_a_while_to_leave(farm: Farm) -> None:
    code = "import threading, time\n\ndef work(n):\n    threading.Thread(target=time.sleep, args=(1000,)).start()\n    return n\n"
    farm.write("slow.py", code)
    master = farm.master("1", "--results", "results.jsonl")
    worker = farm.worker(master, "--processes", 1, "--tasks-per-process", 1, "--wait", 1, "--function", "slow:work")
    assert (master.wait(), worker.wait()) == (0, 0), worker.stderr


def test_a_worker_that_is_thrown_out_again_and_again_takes_its_time(farm: Farm) -> None:
    """A thousand attempts a second would keep the master from whatever it is that ails it, and fill the log."""

    def reply(method: str, arguments: list[str]) -> bytes:
        if method == JOIN:
            raise EOFError
        return good_answer(method)

    master = farm.false_master(reply)
    worker = farm.worker(master.port)
    wait_until(lambda: master.served, worker)
    worker.pause(1.5)
    assert master.served < 50
    assert len(worker.stderr) < 50

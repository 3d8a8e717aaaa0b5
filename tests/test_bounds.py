"""What one peer can hold of the master's memory, threads and tasks is bounded, even if it has the key."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable

import psutil
import pytest
from lab import MEGABYTE, PATIENCE, PLAIN_CLIENT, Farm, Peer, Program, check_silence, make_outcome, peak_memory

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="looks into /proc")

MEMORY_LIMIT = 500 * MEGABYTE
DOUBLE = ("--function", "functions:double")
MODULE = """
import sys
from functions import stay

def large(n):
    return "x" * 5_000_000

def flood(task):
    if task == "flood":
        for _ in range(200):
            sys.stdout.write("x" * (1 << 20))
        sys.stdout.flush()
    return stay(task) if task == "wait" else task
"""


@pytest.fixture(scope="module", autouse=True)
def many_files() -> None:
    """As many open files for ourselves as there may be: the tests hold a thousand connections."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start_impatient(farm: Farm, *argv: object, **options: object) -> Program:
    """A master that waits a second for each MiB of a large message, and not twenty."""
    return farm.run(farm.make_patched(LARGE_LIMIT=1.0) / "task_master.py", "--port", 0, *argv, **options)


def start_attack(attack: Callable[[], object]) -> threading.Thread:
    """In a thread, until it is done or the connection has ended."""

    def run() -> None:
        with contextlib.suppress(OSError, EOFError):
            attack()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def begin_message(peer: Peer) -> None:
    """Send a message of 60 MiB but for its end, as far as it is read."""
    os.write(peer.connection.fileno(), struct.pack("!i", 60 * MEGABYTE))
    for _ in range(59):
        view = memoryview(b"x" * MEGABYTE)
        while view:
            view = view[os.write(peer.connection.fileno(), view) :]


def say(peer: Peer, words: str, text: str) -> None:
    """Call in the way of workers, and await what comes."""
    peer.connection.send_bytes(f"{words}\n{text}".encode())
    peer.connection.recv_bytes()


def hang_up(peer: Peer) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(peer.connection.fileno())) as sock:
        sock.shutdown(socket.SHUT_RDWR)  # the connection stays, since a thread may still be sending there


def test_four_attacks_at_once_leave_the_master_small_and_the_others_served(farm: Farm) -> None:
    where = ("--tasks", "-", "--results", "results.jsonl", "--redeliveries", 1000)
    master = start_impatient(farm, *where, stdin=subprocess.PIPE)
    reporter, releaser, *senders = peers = [farm.peer(master, f"evil/{n}") for n in range(14)]
    reporter.join()
    master.put("0\n")
    ids = reporter.lease_ids()
    worker = farm.worker(master, *DOUBLE)
    master.put("".join(f"{n}\n" for n in range(1, 1000)))
    outcomes = f"{ids[0]}\n" + make_outcome("[" + "{}," * 8_000_000 + "{}]", seconds="0.500000")
    attacks = [start_attack(lambda peer=peer: begin_message(peer)) for peer in senders]
    attacks.append(start_attack(lambda: say(reporter, f"get_result_queue report {reporter.run_id} 0.0", outcomes)))
    attacks.append(start_attack(lambda: say(releaser, "get_task_queue release", "5 " * 7_000_000)))
    other = farm.peer(master, "good/1").join()
    for n in range(20):  # the others are served meanwhile, and the job goes on
        other.lease(1, 0.0)
        master.put("".join(f"{n}\n" for n in range(1000 + 10 * n, 1010 + 10 * n)))
    hang_up(other)
    farm.wait_records(master, 1100)
    for attack in attacks[-2:]:
        attack.join(PATIENCE)
    peak = peak_memory(master.pid)
    for peer in peers:
        hang_up(peer)
    for attack in attacks:
        attack.join(60)
    master.end_input()
    assert master.wait(120) in (0, 1)  # 1: what the attacker has reported may count as a failure
    assert worker.wait() == 0
    ids = re.findall(r'^\{"id": (\d+)', (farm.folder / "results.jsonl").read_text(), re.MULTILINE)
    assert sorted(map(int, ids)) == list(range(1200))
    assert peak < MEMORY_LIMIT, peak // MEGABYTE


def test_a_large_message_that_does_not_come_to_its_end_does_not_stop_another(farm: Farm) -> None:
    master = start_impatient(farm, "1", "2", "--results", "results.jsonl")
    evil = farm.peer(master, "evil/1")
    sender = start_attack(lambda: begin_message(evil))
    worker = farm.worker(master, "--function", "mod:large")
    assert (master.wait(), worker.wait()) == (0, 0)
    hang_up(evil)
    sender.join(PATIENCE)
    assert len(farm.records()) == 2


def test_silent_connections_do_not_use_up_a_master_with_tls(tls_farm: Farm) -> None:
    few_files = "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))"
    argv = ("task_master.py", "--tls", "--port", 0, "--results", "results.jsonl", "--tasks", "-")
    master = tls_farm.run_after(few_files, *argv, stdin=subprocess.PIPE)
    with contextlib.ExitStack() as stack:
        for n in range(1200):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", master.port()), 20))
            with contextlib.suppress(OSError):
                sock.sendall(b"\x16\x03\x01\x02\x00\x01" * (n % 2))  # half a hello, or nothing
        worker = tls_farm.worker(master, *DOUBLE)
        master.give(range(50))
        assert (master.wait(), worker.wait()) == (0, 0), master.stderr
    tls_farm.check_once(50)
    check_silence(master)


STOP = """
import os, signal
print("holds", tasks.get(), flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_the_time_limit_holds_for_a_plain_client_that_has_stopped(farm: Farm) -> None:
    master = farm.master("7", "--results", "results.jsonl", "--timeout", 2, "--retries", 1)
    client = farm.run("-c", PLAIN_CLIENT + STOP, master.port(), farm.key)
    client.wait_line("holds 7", "stdout")
    worker = farm.worker(master, *DOUBLE)
    assert (master.wait(), worker.wait()) == (0, 0)
    (record,) = farm.records()
    assert (record["result"], record["attempts"]) == (14, 2)
    client.signal(signal.SIGKILL)


def test_a_task_that_prints_without_a_line_end_does_not_fill_the_memory(farm: Farm) -> None:
    """Its output comes through the master when that is on a terminal."""
    ours, theirs = pty.openpty()

    def read() -> None:
        while os.read(ours, MEGABYTE):
            pass

    reader = start_attack(read)
    options = ("--port", 0, "--workers", 1, "--function", "mod:flood", "--results", "results.jsonl", '"flood"', '"wait"')
    master = farm.run_after(f"os.dup2({theirs}, 2)", "task_master.py", *options, pass_fds=[theirs])
    os.close(theirs)
    farm.wait_records(master, 1)
    processes = [psutil.Process(master.pid), *psutil.Process(master.pid).children(recursive=True)]
    peaks = {" ".join(process.cmdline()): peak_memory(process.pid) // MEGABYTE for process in processes}
    farm.let_go()
    assert master.wait() == 0
    reader.join(PATIENCE)
    os.close(ours)
    assert max(peaks.values()) < 100, peaks

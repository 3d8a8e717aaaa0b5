"""TLS from the authkey: only who knows the key gets a word in or out, and there is no way back to a plain connection."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import test_chaos
import test_losses
from conftest import ROOT, Farm, Program, find_pythons, tls_python

QUICK = ("--wait", "0.5")


def last_error(program: Program) -> str:
    assert not any("Traceback" in line for line in program.stderr)
    return program.stderr[-1]


class Relay:
    """Passes bytes between workers and a master, keeps a copy, and may change what goes by."""

    def __init__(self, port: int, change: Callable[[bytes], bytes] = lambda data: data) -> None:
        self.seen = bytearray()
        self.connections = 0
        self._target, self._change = port, change
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._socket.accept()[0]
                self.connections += 1
                far = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with source, contextlib.suppress(OSError):
            try:
                while data := source.recv(1 << 16):
                    self.seen += data
                    sink.sendall(self._change(data))
            finally:
                sink.shutdown(socket.SHUT_RDWR)  # the pump that reads from it ends, too

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def relay_to() -> Iterator[Callable[..., Relay]]:
    relays: list[Relay] = []

    def make(port: int, change: Callable[[bytes], bytes] = lambda data: data) -> Relay:
        relays.append(Relay(port, change))
        return relays[-1]

    yield make
    for relay in relays:
        relay.close()


def test_a_job_runs_over_tls(tls_farm: Farm) -> None:
    master = tls_farm.master("--workers", 1, "--", "1", "2")
    assert master.wait() == 0
    assert sorted(line for line in master.stdout if line.startswith("Result")) == ["Result: 1 * 1 = 1", "Result: 2 * 2 = 4"]


def test_a_plain_worker_at_a_tls_master_says_what_may_be_wrong(tls_farm: Farm) -> None:
    master = tls_farm.master()
    worker = tls_farm.run("task_worker.py", "--port", master.port(), *QUICK)
    assert worker.wait() == 3
    assert "does it listen with --tls?" in last_error(worker)


def test_a_tls_worker_at_a_plain_master_does_not_fall_back(tls_farm: Farm) -> None:
    master = tls_farm.run("task_master.py", "--port", 0)
    worker = tls_farm.worker(master, *QUICK)
    assert worker.wait() == 3
    assert "does not speak TLS" in last_error(worker)


def test_a_wrong_key_is_refused_by_the_tls_handshake(tls_farm: Farm) -> None:
    master = tls_farm.master()
    worker = tls_farm.worker(master, *QUICK, env=tls_farm.env(TASK_AUTHKEY="another key of many bytes"))
    assert worker.wait() == 3
    assert "refused the key" in last_error(worker)


@pytest.mark.parametrize("program", ["task_master.py", "task_worker.py"])
def test_an_older_python_is_told_the_remedy(farm: Farm, program: str) -> None:
    old = [python for python in find_pythons() if int(python.rpartition(".")[2]) < 13]
    if not old:
        pytest.skip("every Python here is 3.13 or newer")
    process = farm.run(program, "--tls", python=old[0])
    assert process.wait() == 2
    assert "Python 3.13" in last_error(process)
    assert "SSH tunnel" in last_error(process)


IMPOSTOR = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("certificate.pem", "key.pem")
server = socket.create_server(("127.0.0.1", 0))
print("listening on 127.0.0.1:%d" % server.getsockname()[1], file=sys.stderr, flush=True)
while True:
    try:
        context.wrap_socket(server.accept()[0], server_side=True)
        print("a worker talks to me", flush=True)
    except OSError as error:
        print("refused:", error, flush=True)
"""


def test_an_impostor_with_a_certificate_of_its_own_gets_no_word(tls_farm: Farm) -> None:
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "2"]
    files = ["-keyout", "key.pem", "-out", "certificate.pem"]
    try:
        subprocess.run([*openssl, *files], cwd=tls_farm.folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl command here, to make a certificate with")
    (tls_farm.folder / "impostor.py").write_text(IMPOSTOR)
    impostor = tls_farm.run("impostor.py")
    worker = tls_farm.worker(impostor, *QUICK)
    assert worker.wait() == 3
    assert "not the key" in last_error(worker)
    impostor.wait_line("refused:", "stdout")
    assert "a worker talks to me" not in impostor.stdout


@pytest.mark.parametrize("tls", [False, True])
def test_tasks_and_results_can_be_read_on_the_way_only_without_tls(farm: Farm, relay_to: Callable[..., Relay], tls: bool) -> None:
    python, options = (tls_python(), ["--tls"]) if tls else (sys.executable, [])
    (farm.folder / "secrets_.py").write_text("def answer(task):\n    return 'the answer to ' + task\n")
    master = farm.run("task_master.py", "--port", 0, *options, '"who knows"', python=python)
    relay = relay_to(master.port())
    worker = farm.run("task_worker.py", "--port", relay.port, *options, "--function", "secrets_:answer", python=python)
    assert (worker.wait(), master.wait()) == (0, 0)
    assert "Result: the answer to who knows" in master.stdout
    assert relay.connections
    assert (b"who knows" in relay.seen) is not tls
    assert (b"the answer to" in relay.seen) is not tls


def test_a_flipped_byte_costs_a_connection_and_not_the_job(tls_farm: Farm, relay_to: Callable[..., Relay]) -> None:
    tasks = tls_farm.write_tasks(list(range(200)))
    master = tls_farm.master("--tasks", tasks, "--results", "results.jsonl", "--batch", 10)
    passed = 0

    def flip_once(data: bytes) -> bytes:
        nonlocal passed
        before, passed = passed, passed + len(data)
        if before <= 8000 < passed:
            position = len(data) // 2
            return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        return data

    relay = relay_to(master.port(), flip_once)
    worker = tls_farm.run("task_worker.py", "--port", relay.port, "--tls", "--processes", 1, "--function", "functions:double")
    assert (worker.wait(), master.wait()) == (0, 0)
    assert relay.connections >= 2
    assert sorted(record["result"] for record in tls_farm.records()) == [2 * n for n in range(200)]


def test_a_listening_address_beyond_loopback_without_tls_is_warned_about(farm: Farm) -> None:
    master = farm.master("--host", "0.0.0.0")
    warning = master.wait_line("can read and alter")
    assert "--tls" in warning.string
    assert "SSH" in warning.string


def test_results_are_the_same_with_and_without_tls(any_farm: Farm) -> None:
    master = any_farm.master("--workers", 2, "--tasks", any_farm.write_tasks(list(range(500))), "--results", "results.jsonl")
    assert master.wait() == 0
    records = {record["id"]: json.dumps(record["result"]) for record in any_farm.records()}
    assert records == {n: f'"{n} * {n} = {n * n}"' for n in range(500)}


# ---- crashes and silence, with TLS as without it -------------------------------------------------------------------

CRASHES: list[Callable[[Farm], None]] = [
    test_losses.test_a_worker_killed_in_the_middle_of_a_thousand_tasks_loses_none,
    test_losses.test_the_redelivery_of_a_task_is_said_with_task_worker_attempt_and_reason,
    test_losses.test_with_no_redeliveries_no_task_is_started_twice_however_workers_are_killed,
    test_losses.test_a_worker_killed_while_idle_costs_no_task_its_only_chance,
    test_losses.test_the_children_of_a_killed_worker_end_though_a_task_runs,
    test_losses.test_a_child_killed_while_it_starts_does_not_end_its_worker,
    functools.partial(test_chaos.test_killed_children_and_workers_lose_no_task_and_repeat_no_record, seed=7),
    functools.partial(test_chaos.test_a_master_killed_and_resumed_again_and_again_loses_no_task_and_repeats_no_record, seed=8),
]


@pytest.mark.parametrize("test", CRASHES, ids=lambda test: getattr(test, "func", test).__name__[5:])
def test_crashes_cost_no_more_with_tls(test: Callable[[Farm], None], tls_farm: Farm) -> None:
    (tls_farm.folder / "losses.py").write_text(test_losses.FUNCTIONS)
    test(tls_farm)


@pytest.mark.parametrize("stopped", ["worker", "master"])
def test_silence_is_noticed_with_tls(tls_farm: Farm, stopped: str) -> None:
    """With a tenth of the product's patience, in copies of the two files."""
    limits = {"SILENCE_LIMIT = 60.0": "SILENCE_LIMIT = 6.0", "ANSWER_LIMIT = 44.0": "ANSWER_LIMIT = 4.4"}
    for name in ("task_master.py", "task_worker.py"):
        text = (ROOT / name).read_text().replace("BEAT_INTERVAL = 15.0", "BEAT_INTERVAL = 1.5")
        for limit, shorter in limits.items():
            text = text.replace(limit, shorter)
        (tls_farm.folder / name).write_text(text)
    master = tls_farm.run(tls_farm.folder / "task_master.py", "--tls", "--port", 0, "--", "300")
    options = ("--port", master.port(), "--tls", "--processes", 1, "--function", "functions:nap", "--wait", 1)
    worker = tls_farm.run(tls_farm.folder / "task_worker.py", *options)
    master.wait_line(r"worker \S+ connected")
    programs = {"worker": worker, "master": master}
    programs[stopped].signal(signal.SIGSTOP)
    if stopped == "worker":
        master.wait_line(r"worker \S+ disconnected")
    else:
        worker.wait_line("lost the master")

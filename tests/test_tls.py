"""TLS from the authkey: only who knows the key gets a word in or out, and there is no way back to a plain connection.

Both ends use TLS as soon as the address is beyond loopback, or neither does: what cannot be is refused, and nothing falls back.
What crashes cost is looked at with TLS, too, where it is without: see the tests that take `any_farm`.
"""

from __future__ import annotations

import itertools
import socket
import subprocess
from typing import Any, NamedTuple

import pytest
from lab import ROOT, Farm, Program, Relay, check_one_line, check_said, check_silence, find_pythons, has_psk

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
    impostor = tls_farm.run(tls_farm.write("impostor.py", IMPOSTOR))
    worker = tls_farm.worker(impostor, "--wait", 0.5)
    check_said(worker, 3, "not the key")
    impostor.wait_line("refused:", "stdout")
    assert "a worker talks to me" not in impostor.stdout


def test_tasks_and_results_can_be_read_on_the_way_only_without_tls(any_farm: Farm) -> None:
    any_farm.write("secrets_.py", "def answer(task):\n    return 'the answer to ' + task\n")
    master = any_farm.master('"who knows"')
    relay = any_farm.closing(Relay(master.port()))
    worker = any_farm.worker(relay.port, "--function", "secrets_:answer")
    assert (worker.wait(), master.wait()) == (0, 0)
    assert "Result: the answer to who knows" in master.stdout
    assert relay.served
    assert [words in relay.seen for words in (b"who knows", b"the answer to")] == [not any_farm.tls] * 2


def test_a_flipped_byte_costs_a_connection_and_not_the_job(tls_farm: Farm) -> None:
    tasks = tls_farm.write_tasks(["x" * 100] * 400)
    master = tls_farm.master("--tasks", tasks, "--results", "results.jsonl")
    passed = 0

    def flip_once(data: bytes) -> bytes:
        nonlocal passed
        before, passed = passed, passed + len(data)
        if before <= 8000 < passed:
            position = len(data) // 2
            return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        return data

    relay = tls_farm.closing(Relay(master.port(), flip_once))
    worker = tls_farm.worker(relay.port, "--function", "functions:same")
    assert (worker.wait(), master.wait()) == (0, 0)
    assert relay.served >= 2
    assert [record["result"] for record in tls_farm.records()] == ["x" * 100] * 400


@pytest.mark.parametrize("stopped", ["worker", "master"])
def test_silence_is_noticed_with_tls(tls_farm: Farm, stopped: str) -> None:
    """With a tenth of the product's patience."""
    patched = tls_farm.make_patched(SILENCE_LIMIT=6.0, ANSWER_LIMIT=4.4, BEAT_INTERVAL=1.5)
    master = tls_farm.run(patched / "task_master.py", "--tls", "--port", 0, 300)
    options: Any = ("--port", master.port(), "--tls", "--processes", 1, "--function", "functions:nap", "--wait", 1)
    worker = tls_farm.run(patched / "task_worker.py", *options)
    master.wait_line(r"worker \S+ connected")
    tls_farm.wait_started(worker)
    (worker if stopped == "worker" else master).suspend()
    if stopped == "worker":
        master.wait_line(r"worker \S+ disconnected|redelivered since")
    else:
        worker.wait_line("(lost|cannot reach) the master")


CHOICES = ["--tls", "--no-tls", ""]
LOOPBACK, BEYOND = "loopback", "beyond"


@pytest.fixture(scope="module")
def pythons() -> dict[str, str]:
    """A Python without TLS-PSK and one with it, as far as they are there."""
    return {"new" if has_psk(python) else "old": python for python in find_pythons().values()}


@pytest.fixture(scope="module")
def addresses() -> dict[str, str]:
    """One of this host's addresses that is not loopback, if it has one. Nothing is sent."""
    found = {LOOPBACK: "127.0.0.1"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("198.51.100.1", 9))
            found[BEYOND] = sock.getsockname()[0]
        except OSError:
            pass
    return found


def check_refused(program: Program, choice: str) -> None:
    """One line that names the Python that is needed, and the ways out."""
    check_one_line(program, 2, "3.13", "--ssh", *([] if choice else ["--no-tls"]))


class End(NamedTuple):
    age: str
    choice: str
    place: str

    @property
    def mode(self) -> str:
        """What it does: `tls`, `plain`, or `refuses` to start."""
        wants = self.choice == "--tls" or (not self.choice and self.place == BEYOND)
        return ("tls" if self.age == "new" else "refuses") if wants else "plain"


def skip_unless_there(pythons: dict[str, str], addresses: dict[str, str], *ends: End) -> None:
    if not all(end.age in pythons and end.place in addresses for end in ends):
        pytest.skip(f"here are only {pythons} and {addresses}")


def check_warned(program: Program, end: End) -> None:
    """Who listens or connects in plain text beyond loopback says who can then read and alter what."""
    warned = bool(program.said("can read|read and alter"))
    assert warned == (end.mode == "plain" and end.place == BEYOND), program.stderr


ENDS = [End(*end) for end in itertools.product(["old", "new"], CHOICES, [LOOPBACK, BEYOND])]
STARTING = [end for end in ENDS if end.mode != "refuses"]
PAIRS = [(master, worker) for master, worker in itertools.product(STARTING, repeat=2) if master.place == worker.place]


@pytest.mark.parametrize(("listens", "connects"), PAIRS, ids=" ".join)
def test_a_pair(farm: Farm, pythons: dict[str, str], addresses: dict[str, str], listens: End, connects: End) -> None:
    """Where only the time for a handshake tells that they do not fit, with a fifth of it."""
    skip_unless_there(pythons, addresses, listens, connects)
    silent = (listens.mode, connects.mode) == ("tls", "plain")
    patched = farm.make_patched(HANDSHAKE_LIMIT=2.0) if silent else ROOT

    def start(end: End, program: str, *options: object) -> Program:
        where = ("--host", addresses[end.place], *end.choice.split())
        return farm.run(patched / program, *where, *options, python=pythons[end.age])

    master = start(listens, "task_master.py", "--port", 0, "3")
    worker = start(connects, "task_worker.py", "--port", master.port(), "--processes", 1, "--wait", 0.3)
    if connects.mode != listens.mode:
        assert worker.wait() == 3
        assert "tls" in worker.stderr[-1].lower()
        assert master.is_running()
    else:
        assert (worker.wait(), master.wait()) == (0, 0), worker.stderr + master.stderr
        assert "Result: 3 * 3 = 9" in master.stdout
        check_warned(worker, connects)
    check_warned(master, listens)
    check_silence(master, worker)


@pytest.mark.parametrize("end", [end for end in ENDS if end.mode == "refuses"], ids=" ".join)
@pytest.mark.parametrize("program", ["master", "worker"])
def test_an_end_that_cannot_do_what_it_should_does_not_start(
    farm: Farm, pythons: dict[str, str], addresses: dict[str, str], end: End, program: str
) -> None:
    skip_unless_there(pythons, addresses, end)
    where = ("--host", addresses[end.place], "--port", 1, *end.choice.split())
    check_refused(farm.run(f"task_{program}.py", *where, python=pythons[end.age]), end.choice)


@pytest.mark.parametrize("end", STARTING, ids=" ".join)
def test_a_local_worker_does_as_its_master(farm: Farm, pythons: dict[str, str], addresses: dict[str, str], end: End) -> None:
    skip_unless_there(pythons, addresses, end)
    argv = ("--port", 0, "--host", addresses[end.place], *end.choice.split(), "--workers", 1, "3")
    master = farm.run("task_master.py", *argv, python=pythons[end.age])
    assert master.wait() == 0, master.stderr
    assert "Result: 3 * 3 = 9" in master.stdout


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_master_on_every_address_is_beyond_loopback(farm: Farm, pythons: dict[str, str], host: str) -> None:
    if "old" not in pythons:
        pytest.skip("every Python here can do TLS with a key")
    check_refused(farm.run("task_master.py", "--host", host, "--port", 0, "3", python=pythons["old"]), "")

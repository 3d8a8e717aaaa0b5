"""TLS from the authkey: only who knows the key gets a word in or out, and there is no way back to a plain connection.

What crashes cost is looked at with TLS, too, where it is without: see the tests that take `any_farm`.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from lab import Farm, Relay, check_silence, make_patched

QUICK = ("--wait", "0.5")


def test_results_are_the_same_with_and_without_tls(any_farm: Farm) -> None:
    master = any_farm.master("--workers", 2, "--tasks", any_farm.write_tasks(range(500)), "--results", "results.jsonl")
    assert master.wait() == 0
    records = {record["id"]: json.dumps(record["result"]) for record in any_farm.records()}
    assert records == {n: f'"{n} * {n} = {n * n}"' for n in range(500)}


def test_a_worker_with_another_key_is_refused(tls_farm: Farm) -> None:
    master = tls_farm.master("1")
    worker = tls_farm.worker(master, *QUICK, env=tls_farm.env(TASK_AUTHKEY="another key of many bytes"))
    assert worker.wait() == 3
    assert "refused the key" in worker.stderr[-1]
    master.wait_line("refused a connection from .*its key is another one")
    check_silence(worker, master)


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
    worker = tls_farm.worker(impostor, *QUICK)
    assert worker.wait() == 3
    assert "not the key" in worker.stderr[-1]
    check_silence(worker)
    impostor.wait_line("refused:", "stdout")
    assert "a worker talks to me" not in impostor.stdout


def test_tasks_and_results_can_be_read_on_the_way_only_without_tls(any_farm: Farm) -> None:
    any_farm.write("secrets_.py", "def answer(task):\n    return 'the answer to ' + task\n")
    master = any_farm.master('"who knows"')
    relay = any_farm.closing(Relay(master.port()))
    worker = any_farm.worker(relay.port, "--function", "secrets_:answer")
    assert (worker.wait(), master.wait()) == (0, 0)
    assert "Result: the answer to who knows" in master.stdout
    assert relay.connections
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
    assert relay.connections >= 2
    assert [record["result"] for record in tls_farm.records()] == ["x" * 100] * 400


@pytest.mark.parametrize("stopped", ["worker", "master"])
def test_silence_is_noticed_with_tls(tls_farm: Farm, stopped: str) -> None:
    """With a tenth of the product's patience."""
    patched = make_patched(tls_farm, SILENCE_LIMIT=6.0, ANSWER_LIMIT=4.4, BEAT_INTERVAL=1.5)
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

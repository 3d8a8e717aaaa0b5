"""Whatever stands behind --host is an address or one line."""

from __future__ import annotations

import re
import socket

import pytest
from lab import Farm, Program

ODD_HOSTS = [
    "a..b",
    ".local",
    ".",
    "x" * 70,
    "x" * 70 + ".example",
    "x." * 200,
    "two words",
    "no-such-host.invalid",
    "1.2.3.4.5",
    "256.1.1.1",
    "127.0.0.1:5000",
    "[::1]",
    "::1::",
    "fe80::1%nothing",
    "ü.example",
    "\u2024.\u2024",
    "ß" * 60,
    "\udcff",
    "http://localhost",
    "tab\there",
    "line\nend",
]


def only_line(program: Program) -> str:
    assert not any("Traceback" in line or "internal error" in line for line in program.stderr), program.stderr
    assert len(program.stderr) <= 2, program.stderr  # a worker says that it waits, and then that it gives up
    return program.stderr[-1]


def test_an_odd_host_is_one_line_that_names_it(farm: Farm) -> None:
    masters = {host: farm.run("task_master.py", "--host", host, "--port", 0, "1") for host in ODD_HOSTS}
    for host, master in masters.items():
        assert master.wait() in (2, 3), (host, master.stderr)
        assert only_line(master).startswith("task_master: ")
        assert not (host.isascii() and host.isprintable()) or host[:60] in only_line(master)


def test_a_worker_with_an_odd_host_ends_with_one_line(farm: Farm) -> None:
    options = ("--port", 1, "--wait", 0.2, "--processes", 1)
    workers = {host: farm.run("task_worker.py", "--host", host, *options) for host in ODD_HOSTS}
    for host, worker in workers.items():
        assert worker.wait() in (2, 3), (host, worker.stderr)
        assert only_line(worker).startswith("task_worker: ")


def connects(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 20).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("host", "shown"), [("", r"0\.0\.0\.0"), ("0.0.0.0", r"0\.0\.0\.0"), ("::", r"\[?::\]?")])
def test_every_address_is_listened_on_and_the_line_says_so(farm: Farm, host: str, shown: str) -> None:
    master = farm.master("--host", host, "--no-tls", "1")
    assert re.search(rf"listening on {shown}:\d+$", master.wait_line("listening on").string)
    assert connects("127.0.0.1", master.port())
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
@pytest.mark.parametrize("worker_host", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_a_master_on_every_address_of_both_kinds_takes_workers_of_both_kinds(farm: Farm, worker_host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    master = farm.master("--host", "::", "--no-tls", "1")
    worker = farm.worker(master, "--host", worker_host, "--no-tls")
    assert (worker.wait(), master.wait()) == (0, 0)


@pytest.mark.parametrize("host", ["::", "::1", "", "localhost", "127.0.0.2"])
def test_local_workers_find_a_master_on_any_address(farm: Farm, host: str) -> None:
    master = farm.master("--host", host, "--no-tls", "--workers", 1, "3")
    assert master.wait() == 0, master.stderr
    assert "Result: 3 * 3 = 9" in master.stdout

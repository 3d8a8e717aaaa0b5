"""Whatever stands behind --host is an address or one line."""

from __future__ import annotations

import re
import socket

import pytest
from lab import Farm, check_silence

from task_worker import is_loopback

NO_NAMES = ["a..b", ".", "x" * 70 + ".example", "x." * 200, "two words", "no-such-host.invalid", "http://localhost"]
NO_NUMBERS = ["256.1.1.1", "127.0.0.1:5000", "[::1]", "::1::", "fe80::1%nothing"]
NO_ASCII = ["ü.example", "\u2024.\u2024", "ß" * 60, "\udcff", "tab\there", "line\nend"]


@pytest.mark.parametrize(("program", "options"), [("task_master", [0, "1"]), ("task_worker", [1, "--wait", 0.2])])
def test_an_odd_host_is_one_line_that_names_it(farm: Farm, program: str, options: list[object]) -> None:
    programs = {host: farm.run(f"{program}.py", "--host", host, "--port", *options) for host in NO_NAMES + NO_NUMBERS + NO_ASCII}
    for host, ended in programs.items():
        assert ended.wait() in (2, 3), (host, ended.stderr)
        check_silence(ended)
        assert len(ended.stderr) <= 2, ended.stderr  # a worker says that it waits, and then that it gives up
        assert ended.stderr[-1].startswith(f"{program}: ")
        assert not (host.isascii() and host.isprintable()) or host[:60] in ended.stderr[-1]


def test_a_name_that_looks_like_a_loopback_address_is_none() -> None:
    names = ["127.0.0.1", "127.1", "::1", "localhost", "127.example.org", "127.0.0.1.example.org", "10.0.0.1"]
    assert [name for name in names if is_loopback(name)] == names[:4]


@pytest.mark.parametrize("worker_host", ["::1", "localhost", "0.0.0.0"])
def test_a_master_on_every_address_of_both_kinds_takes_workers_of_both_kinds(farm: Farm, worker_host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    master = farm.master("--host", "::", "--no-tls", "1")
    worker = farm.worker(master, "--host", worker_host, "--no-tls")
    assert (worker.wait(), master.wait()) == (0, 0)


ALL = [("", "0.0.0.0"), ("0.0.0.0", "0.0.0.0"), ("::", "[::]")]
LOCALHOST = str(socket.getaddrinfo("localhost", None)[0][4][0]).replace("::1", "[::1]")  # which of the two, this system decides
LOOPBACK = [("127.0.0.1", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("localhost", LOCALHOST), ("::1", "[::1]")]


@pytest.mark.parametrize(("host", "shown"), ALL + LOOPBACK)
def test_local_workers_find_a_master_on_any_address_which_it_tells(farm: Farm, host: str, shown: str) -> None:
    choice = ["--no-tls"] * ((host, shown) in ALL)
    master = farm.run_master("--host", host, *choice, "--workers", 1, "3")
    assert master.said(rf"listening on {re.escape(shown)}:\d+$")
    assert "Result: 3 * 3 = 9" in master.stdout

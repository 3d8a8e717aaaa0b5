"""Encrypted unless one says otherwise: every pair of Pythons, choices and addresses runs its job, or says why not.

Both ends use TLS as soon as the address is beyond loopback, or neither does: what cannot be is refused, and nothing falls back.
"""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import pytest
from lab import Farm, Program, find_pythons

CHOICES = ["--tls", "--no-tls", ""]
LOOPBACK, BEYOND = "loopback", "beyond"


def has_psk(python: str) -> bool:
    command = [python, "-c", "import ssl; ssl.HAS_PSK or exit(1)"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def pythons() -> dict[str, str]:
    """The oldest Python without TLS-PSK and the newest one with it, as far as they are there."""
    return {
        "new" if has_psk(python) else "old": python
        for python in [*find_pythons().values()][::-1] + [*find_pythons().values()][-1:]
    }


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


def find_mode(age: str, choice: str, place: str) -> str:
    """What an end does: `tls`, `plain`, or `refuses` to start."""
    wants = choice == "--tls" or (not choice and place == BEYOND)
    return ("tls" if age == "new" else "refuses") if wants else "plain"


def check_refused(program: Program, choice: str) -> None:
    """One line that names the Python that is needed, and the ways out."""
    assert program.wait() == 2
    (line,) = program.stderr
    for word in ["3.13", "--ssh", *([] if choice else ["--no-tls"])]:
        assert word in line


def check_warned(program: Program, mode: str, place: str) -> None:
    """Who listens or connects in plain text beyond loopback says who can then read and alter what."""
    warned = any(re.search("can read|read and alter", line) for line in program.stderr)
    assert warned == (mode == "plain" and place == BEYOND), program.stderr


class End(NamedTuple):
    age: str
    choice: str
    place: str

    @property
    def mode(self) -> str:
        return find_mode(*self)


Pair = tuple[End, End]
PAIRS: list[Pair] = [
    (End(master_age, master_choice, place), End(worker_age, worker_choice, place))
    for place in (LOOPBACK, BEYOND)
    for master_age, worker_age in itertools.product(["old", "new"], repeat=2)
    for master_choice, worker_choice in itertools.product(CHOICES, repeat=2)
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, pythons: dict[str, str], addresses: dict[str, str]) -> Iterator[Any]:
    """Starts a pair; those that take the time of a handshake are all started with the first one."""
    farm = Farm(tmp_path_factory.mktemp("pairs"))
    begun: dict[Pair, list[Program]] = {}

    def run(end: End, program: str, *options: object) -> Program:
        where = ("--host", addresses[end.place], *end.choice.split())
        return farm.run(program, *where, *options, python=pythons[end.age])

    def begin(pair: Pair) -> list[Program]:
        if {end.age for end in pair} - set(pythons) or pair[0].place not in addresses:
            pytest.skip(f"here are only {pythons} and {addresses}")
        master = run(pair[0], "task_master.py", "--port", 0, "3")
        if pair[0].mode == "refuses":
            return [master]
        return [master, run(pair[1], "task_worker.py", "--port", master.port(), "--processes", 1, "--wait", 0.3)]

    def start_pair(pair: Pair) -> list[Program]:
        if not begun:
            slow = [each for each in PAIRS if [end.mode for end in each] == ["tls", "plain"]]
            begun.update({each: begin(each) for each in slow if "new" in pythons and each[0].place in addresses})
        return begun.get(pair) or begin(pair)

    yield start_pair
    farm.close()
    assert not any("Traceback" in line for program in farm.programs for line in program.stderr)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(map(" ".join, pair)))
def test_a_pair(start: Callable[[Pair], list[Program]], pair: Pair) -> None:
    (master, *workers), (listens, connects) = start(pair), pair
    if listens.mode == "refuses":
        check_refused(master, listens.choice)
        return
    (worker,) = workers
    if connects.mode == "refuses":
        check_refused(worker, connects.choice)
    elif connects.mode != listens.mode:
        assert worker.wait() == 3
        assert "tls" in worker.stderr[-1].lower()
        assert master.process.poll() is None
    else:
        assert (worker.wait(), master.wait()) == (0, 0), worker.stderr + master.stderr
        assert "Result: 3 * 3 = 9" in master.stdout
        check_warned(worker, connects.mode, connects.place)
    check_warned(master, listens.mode, listens.place)


@pytest.mark.parametrize("age", ["old", "new"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("place", [LOOPBACK, BEYOND])
def test_a_local_worker_does_as_its_master(
    farm: Farm, pythons: dict[str, str], addresses: dict[str, str], age: str, choice: str, place: str
) -> None:
    if age not in pythons or place not in addresses:
        pytest.skip(f"here are only {pythons} and {addresses}")
    argv = ("--port", 0, "--host", addresses[place], *choice.split(), "--workers", 1, "3")
    master = farm.run("task_master.py", *argv, python=pythons[age])
    if find_mode(age, choice, place) == "refuses":
        check_refused(master, choice)
    else:
        assert master.wait() == 0, master.stderr
        assert "Result: 3 * 3 = 9" in master.stdout


@pytest.mark.parametrize("program", ["task_master.py", "task_worker.py"])
def test_both_choices_at_once_are_a_mistake(farm: Farm, program: str) -> None:
    both = farm.run(program, "--tls", "--no-tls")
    assert both.wait() == 2
    assert re.search("not allowed with|both|one of", both.stderr[-1])


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_master_on_every_address_is_beyond_loopback(farm: Farm, pythons: dict[str, str], host: str) -> None:
    if "old" not in pythons:
        pytest.skip("every Python here can do TLS with a key")
    check_refused(farm.run("task_master.py", "--host", host, "--port", 0, "3", python=pythons["old"]), "")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback_by_any_name_needs_no_choice(farm: Farm, host: str) -> None:
    master = farm.run("task_master.py", "--host", host, "--port", 0, "--workers", 1, "3")
    assert master.wait() == 0, master.stderr

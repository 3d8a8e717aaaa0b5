"""A host that vanishes and a process that stops are noticed within 60 s on both sides; one that is only busy never is.

All of it takes a minute of waiting, so it is all waited for at the same time, beside the tests of test_hostile.py if these
are run, too; and each test here looks at one part.

    python tests/test_hosts.py

prints how long it took until each loss was noticed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Farm, Program
from test_losses import TASKS, Peer

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks into /proc")

PROMISE = 60.0  # seconds within which a silent peer is noticed
NOISE = 2.0  # seconds that this machine may add
CUT = 12.0  # seconds without a link that are survived

FUNCTIONS = r'''
import ctypes, os, time

def work(task):
    """On the far host it takes until there is a file `go`; anywhere else no time."""
    host = os.environ["HOST"]
    open(f"running-{host}", "w").close()
    while host == "far" and not os.path.exists("go"):
        time.sleep(0.05)
    return host

def inflate(task):
    return work(task) + "x" * 20_000_000

def hold(seconds):
    """Sleep in C without letting any other thread of this process run."""
    ctypes.PyDLL(None).sleep(int(seconds))
    return seconds
'''


def run_ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Cable:
    """Two hosts, each a network namespace, and the cable between them."""

    def __init__(self, number: int) -> None:
        self.near, self.far = f"tm{os.getpid()}n{number}", f"tm{os.getpid()}f{number}"
        self.address = "10.213.0.1"  # of the near one, as the far one sees it; nobody else does
        try:
            for name in (self.near, self.far):
                run_ip("netns", "add", name)
                run_ip("-n", name, "link", "set", "lo", "up")
            run_ip("-n", self.near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self.far)
            for name, address in ((self.near, self.address), (self.far, "10.213.0.2")):
                run_ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                run_ip("-n", name, "link", "set", "cable", "up")
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        run_ip("-n", self.far, "link", "set", "cable", "down")

    def mend(self) -> None:
        run_ip("-n", self.far, "link", "set", "cable", "up")

    def close(self) -> None:
        for name in (self.near, self.far):
            with contextlib.suppress(subprocess.CalledProcessError):
                run_ip("netns", "delete", name)


def why_no_cable() -> str:
    """Why this machine does not let us make network namespaces; "" when it does."""
    if not shutil.which("ip"):
        return "there is no `ip` command"
    try:
        Cable(0).close()
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


class Scene:
    """A master and its workers, on one host or on two."""

    def __init__(self, folder: Path, cable: Cable | None = None) -> None:
        self.farm, self.cable = Farm(folder), cable
        (folder / "hosts.py").write_text(FUNCTIONS)

    def start(self, host: str, file: str, *options: object, **more: Any) -> Program:
        """Start a program on the near or on the far host; its functions know which it is."""
        place = ["ip", "netns", "exec", getattr(self.cable, host)] if self.cable else []
        command = [*place, sys.executable, str(ROOT / file), *map(str, options)]
        program = Program(command, self.farm.folder, self.farm.env(HOST=host), **more)
        self.farm.programs.append(program)
        return program

    def master(self, *options: object, **more: Any) -> Program:
        where = ("--host", self.cable.address) if self.cable else ()
        self.the_master = self.start(
            "near", "task_master.py", "--port", 0, *where, "--results", "results.jsonl", *options, **more
        )
        return self.the_master

    def worker(self, host: str, function: str = "hosts:work") -> Program:
        where = ("--host", self.cable.address) if self.cable else ()
        options = ("--port", self.the_master.port(), *where, "--processes", 1, "--function", function)
        return self.start(host, "task_worker.py", *options)

    def wait_running(self, program: Program, host: str = "far") -> None:
        """Block until a task runs there."""
        path = self.farm.folder / f"running-{host}"
        for _ in range(1200):
            if path.exists():
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(0.05)
                break
        pytest.fail(f"no task runs on the {host} host: {program.lines}")

    def let_go(self) -> None:
        (self.farm.folder / "go").touch()

    def put(self, text: str) -> None:
        self.the_master.process.stdin.write(text.encode())
        self.the_master.process.stdin.close()

    def record(self) -> dict[str, Any]:
        """The record of the only task, once the job is over."""
        assert self.the_master.wait() == 0, self.the_master.stderr
        (record,) = self.farm.records()
        return record

    def close(self) -> None:
        for program in self.farm.programs:
            if program.process.stdin:
                with contextlib.suppress(BrokenPipeError):
                    program.process.stdin.close()
            program.process.send_signal(signal.SIGCONT) if program.process.poll() is None else None
        self.farm.close()


def seconds_until(program: Program, pattern: str, since: float) -> float:
    """Seconds from an instant until a program says a line; infinite when it does not in time."""
    try:
        program.wait_line(pattern, timeout=max(0.1, since + PROMISE + NOISE - time.monotonic()))
    except pytest.fail.Exception:
        return float("inf")
    return time.monotonic() - since


# ---- what is waited for, all at once -------------------------------------------------------------------------------


def cut_while_idle(scene: Scene) -> dict[str, Any]:
    """The far worker runs a task, and nobody has anything to say when the link goes down."""
    master = scene.master("1")
    far = scene.worker("far")
    scene.wait_running(far)
    scene.worker("near").wait_line("connected")
    assert scene.cable
    sockets = count_sockets(far)
    scene.cable.cut()
    cut_at = time.monotonic()
    noticed = seconds_until(master, "redelivered since", cut_at)
    record = scene.record()
    return {"master": noticed, "worker": seconds_until_closed(far, sockets, cut_at), "record": record, "far": far.stderr}


def cut_with_data_on_the_way(scene: Scene) -> dict[str, Any]:
    """The far worker waits for a task when the link goes down; the task is sent, and never acknowledged."""
    master = scene.master("--tasks", "-", stdin=subprocess.PIPE)
    far = scene.worker("far")
    master.wait_line("connected")
    assert scene.cable
    scene.cable.cut()
    cut_at = time.monotonic()
    scene.put("1\n")
    scene.worker("near").wait_line("connected")
    noticed = seconds_until(master, "redelivered since", cut_at)
    record = scene.record()
    return {"master": noticed, "worker": seconds_until(far, "lost the master", cut_at), "record": record}


def cut_and_mended(scene: Scene) -> dict[str, Any]:
    """The link comes back before anybody gives up."""
    master = scene.master("1")
    far = scene.worker("far")
    scene.wait_running(far)
    scene.worker("near").wait_line("connected")
    assert scene.cable
    scene.cable.cut()
    with contextlib.suppress(subprocess.TimeoutExpired):
        master.process.wait(CUT)
    scene.cable.mend()
    scene.let_go()
    record = scene.record()
    return {"record": record, "said": master.stderr, "far": far.stderr}


def worker_stopped(scene: Scene) -> dict[str, Any]:
    """A worker is stopped in the middle of a task, and goes on when another has finished it."""
    master = scene.master("1")
    far = scene.worker("far")
    scene.wait_running(far)
    scene.worker("near").wait_line("connected")
    far.signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    noticed = seconds_until(master, "redelivered since", stopped_at)
    record = scene.record()
    scene.let_go()
    far.signal(signal.SIGCONT)
    return {"master": noticed, "record": record}


def worker_stopped_with_data_on_the_way(scene: Scene) -> dict[str, Any]:
    """A slot asks for a task that fills its buffers, and reads none of it."""
    (scene.farm.folder / "tasks.jsonl").write_text('"' + "x" * 20_000_000 + '"\n')
    master = scene.master("--tasks", "tasks.jsonl")
    peer = Peer(scene.farm, master.port())
    peer.join()
    while not peer.call(TASKS, "qsize"):  # it takes a while to read
        pass
    peer.ask(TASKS, "lease", 1, 20.0)
    assert peer.connection.poll(20)
    stopped_at = time.monotonic()
    scene.worker("near").wait_line("connected")
    noticed = seconds_until(master, "redelivered since", stopped_at)
    record = scene.record()
    peer.close()
    return {"master": noticed, "record": {**record, "task": None}}


def count_sockets(program: Program) -> int:
    """How many sockets a process has: one fewer when it has closed a connection."""
    links = Path(f"/proc/{program.pid}/fd").iterdir()
    count = 0
    for link in links:
        with contextlib.suppress(OSError):
            count += os.readlink(link).startswith("socket:")
    return count


def seconds_until_closed(program: Program, sockets: int, since: float) -> float:
    """Seconds from an instant until a worker has closed its connection; infinite when it does not in time."""
    while time.monotonic() < since + PROMISE + NOISE and program.process.poll() is None:
        if count_sockets(program) < sockets:
            return time.monotonic() - since
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(0.1)
    return float("inf")


def master_stopped(scene: Scene) -> dict[str, Any]:
    """The master is stopped while a worker has a task, another one none; it goes on, and so does the job."""
    master = scene.master("1")
    far = scene.worker("far")
    scene.wait_running(far)
    near = scene.worker("near")
    near.wait_line("connected")
    sockets = count_sockets(far)
    master.signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    idle = seconds_until(near, "lost the master", stopped_at)
    busy = seconds_until_closed(far, sockets, stopped_at)
    master.signal(signal.SIGCONT)
    scene.let_go()
    return {"idle worker": idle, "busy worker": busy, "record": scene.record()}


def master_stopped_with_data_on_the_way(scene: Scene) -> dict[str, Any]:
    """The master is stopped when a result comes that fills its buffers."""
    master = scene.master("1")
    far = scene.worker("far", "hosts:inflate")
    scene.wait_running(far)
    master.signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    scene.let_go()
    worker = seconds_until(far, "lost the master", stopped_at)
    master.signal(signal.SIGCONT)
    record = scene.record()
    return {"worker": worker, "record": {**record, "result": len(record["result"])}}


def lock_held(scene: Scene) -> dict[str, Any]:
    """A task does not let any other thread of its process run, for longer than silence is suffered."""
    master = scene.master(str(PROMISE + 2))
    scene.worker("far", "hosts:hold")
    scene.worker("near", "hosts:hold")
    assert master.wait(90) == 0
    (record,) = scene.farm.records()
    return {"record": record, "said": master.stderr}


ON_ONE_HOST = [
    worker_stopped,
    worker_stopped_with_data_on_the_way,
    master_stopped,
    master_stopped_with_data_on_the_way,
    lock_held,
]
ON_TWO_HOSTS = [cut_while_idle, cut_with_data_on_the_way, cut_and_mended]


class Scenes:
    """All that takes a minute, going on at the same time."""

    def __init__(self, folder: Path) -> None:
        self.no_cable = why_no_cable()
        acts = [*ON_ONE_HOST, *([] if self.no_cable else ON_TWO_HOSTS)]
        self._cables: list[Cable] = []
        self._scenes: list[Scene] = []
        self._pool = ThreadPoolExecutor(len(acts))
        self._outcomes: dict[str, Future[dict[str, Any]]] = {}
        for number, act in enumerate(acts, 1):
            place = folder / act.__name__
            place.mkdir()
            cable = Cable(number) if act in ON_TWO_HOSTS else None
            self._cables += [cable] if cable else []
            self._scenes.append(Scene(place, cable))
            self._outcomes[act.__name__] = self._pool.submit(self._play, act, self._scenes[-1])

    def _play(self, act: Any, scene: Scene) -> dict[str, Any]:
        try:
            outcome: dict[str, Any] = act(scene)
        finally:
            scene.close()
        return outcome

    def outcome(self, act: Any) -> dict[str, Any]:
        """What it gave; blocks until it has."""
        if act.__name__ not in self._outcomes:
            pytest.skip(self.no_cable)
        return self._outcomes[act.__name__].result()

    def close(self) -> None:
        for scene in self._scenes:
            scene.close()
        self._pool.shutdown()
        for cable in self._cables:
            cable.close()


_begun: list[Scenes] = []  # the one that there is, since two modules share it


def begin_scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    if not _begun:
        _begun.append(Scenes(tmp_path_factory.mktemp("hosts")))
    return _begun[0]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenes]:
    yield begin_scenes(tmp_path_factory)
    _begun.pop().close()


def check_noticed(seconds: float) -> None:
    assert seconds <= PROMISE + NOISE


def check_finished_by_another(outcome: dict[str, Any]) -> None:
    check_noticed(outcome["master"])
    assert outcome["record"]["result"] == "near"
    assert outcome["record"]["attempts"] == 2


def test_a_link_that_goes_down_while_all_is_quiet_is_noticed_and_another_worker_finishes_the_task(scenes: Scenes) -> None:
    check_finished_by_another(scenes.outcome(cut_while_idle))


def test_a_link_that_goes_down_with_data_on_the_way_is_noticed_and_another_worker_finishes_the_task(scenes: Scenes) -> None:
    check_finished_by_another(scenes.outcome(cut_with_data_on_the_way))


@pytest.mark.parametrize("act", [cut_while_idle, cut_with_data_on_the_way])
def test_a_worker_notices_a_link_that_goes_down(scenes: Scenes, act: Any) -> None:
    check_noticed(scenes.outcome(act)["worker"])


def test_a_busy_worker_says_at_once_that_it_lost_its_master(scenes: Scenes) -> None:
    outcome = scenes.outcome(cut_while_idle)
    check_noticed(outcome["worker"])
    assert any("lost the master" in line for line in outcome["far"])


def test_a_link_that_comes_back_in_time_costs_nothing(scenes: Scenes) -> None:
    outcome = scenes.outcome(cut_and_mended)
    assert (outcome["record"]["result"], outcome["record"]["attempts"]) == ("far", 1)
    assert any("0 redelivered" in line for line in outcome["said"])
    assert not any("lost" in line for line in outcome["far"])


def test_a_worker_that_stops_is_noticed_and_another_one_finishes_its_task(scenes: Scenes) -> None:
    check_finished_by_another(scenes.outcome(worker_stopped))


def test_a_worker_that_stops_with_data_on_the_way_is_noticed(scenes: Scenes) -> None:
    check_finished_by_another(scenes.outcome(worker_stopped_with_data_on_the_way))


def test_an_idle_worker_notices_a_master_that_stops(scenes: Scenes) -> None:
    check_noticed(scenes.outcome(master_stopped)["idle worker"])


def test_a_busy_worker_notices_a_master_that_stops(scenes: Scenes) -> None:
    check_noticed(scenes.outcome(master_stopped)["busy worker"])


def test_a_worker_notices_a_master_that_stops_with_data_on_the_way(scenes: Scenes) -> None:
    check_noticed(scenes.outcome(master_stopped_with_data_on_the_way)["worker"])


@pytest.mark.parametrize(
    ("act", "results"), [(master_stopped, ("near", "far")), (master_stopped_with_data_on_the_way, (20_000_003,))]
)
def test_a_master_that_goes_on_finishes_the_job(scenes: Scenes, act: Any, results: tuple[object, ...]) -> None:
    assert scenes.outcome(act)["record"]["result"] in results


def test_a_task_that_lets_no_other_thread_run_does_not_cost_its_lease(scenes: Scenes) -> None:
    outcome = scenes.outcome(lock_held)
    assert outcome["record"]["attempts"] == 1
    assert outcome["record"]["seconds"] > PROMISE
    assert any("0 redelivered" in line for line in outcome["said"])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        began_at = time.monotonic()
        scenes = Scenes(Path(folder))
        try:
            for act in [*ON_TWO_HOSTS, *ON_ONE_HOST]:
                if act in ON_TWO_HOSTS and scenes.no_cable:
                    print(f"{act.__name__}: skipped, {scenes.no_cable}")
                    continue
                outcome = scenes.outcome(act)
                times = [f"{who} noticed after {value:.1f} s" for who, value in outcome.items() if isinstance(value, float)]
                print(f"{act.__name__}: {', '.join(times) or 'nothing was noticed'}; record {outcome['record']}", flush=True)
        finally:
            scenes.close()
        print(f"{time.monotonic() - began_at:.0f} s in all")


if __name__ == "__main__":
    main()

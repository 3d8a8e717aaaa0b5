#!/usr/bin/env python3
"""Measures how fast the farm is, beside what a user might install instead. Run by hand:

    python tests/benchmark.py [--only NAME ...] [--runs N] [--quick]

One function a figure; each prints what it measures and gives rows of the table that ends the run. Every number is the
median of N runs, in which those that are compared take turns. Linux only: memory and CPU time are read from /proc.
execnet and dask.distributed take part when they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import random
import re
import secrets
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MASTER, WORKER = str(ROOT / "task_master.py"), str(ROOT / "task_worker.py")

# What the workers run. The naps return the process that slept, so that one can tell the slots apart.
FUNCTIONS = """
import os, time

def square(n):
    return n * n

def nap(seconds):
    time.sleep(seconds)
    return os.getpid()
"""

# The contenders for throughput, each a program that takes the number of tasks and does them.

POOL = """
import json, multiprocessing, os, sys, time

def work(numbered_line):
    number, line = numbered_line
    task = json.loads(line)
    started_at = time.perf_counter()
    result = task * task
    seconds = round(time.perf_counter() - started_at, 6)
    return json.dumps({"id": number, "task": task, "result": result, "seconds": seconds, "worker": name, "attempts": 1}) + "\\n"

name = f"host/{os.getpid()}"
if __name__ == "__main__":
    with open(sys.argv[1]) as tasks, open(sys.argv[2], "w") as results, multiprocessing.Pool(2) as pool:
        results.writelines(pool.imap_unordered(work, enumerate(tasks), int(sys.argv[3])))
"""

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from task_master import TaskMaster

if __name__ == "__main__":
    with TaskMaster(port=0, workers=2, function="functions:square") as master:
        for record in master.run(range(int(sys.argv[2]))):
            assert record.result == record.task * record.task
"""

TUTORIAL = """
import multiprocessing, queue, sys, time
from multiprocessing.managers import BaseManager

tasks, results = queue.Queue(), queue.Queue()
class QueueManager(BaseManager): pass

def work(address):
    QueueManager.register("get_task_queue")
    QueueManager.register("get_result_queue")
    manager = QueueManager(address, b"abc")
    manager.connect()
    tasks, results = manager.get_task_queue(), manager.get_result_queue()
    while (n := tasks.get()) is not None:
        results.put(n * n)

def run(count, workers, use):
    QueueManager.register("get_task_queue", callable=lambda: tasks)
    QueueManager.register("get_result_queue", callable=lambda: results)
    with QueueManager(("127.0.0.1", 0), b"abc", ctx=multiprocessing.get_context("fork")) as manager:
        for _ in range(workers):
            multiprocessing.Process(target=work, args=(manager.address,), daemon=True).start()
        use(manager.get_task_queue(), manager.get_result_queue(), count)

def throughput(tasks, results, count):
    for n in range(count):
        tasks.put(n)
    for n in range(count):
        results.get()

def latency(tasks, results, count):
    for n in range(count + 20):
        time.sleep(0.005)
        asked_at = time.perf_counter()
        tasks.put(n)
        results.get()
        if n >= 20:
            print(time.perf_counter() - asked_at)

if __name__ == "__main__":
    run(int(sys.argv[2]), 2, {"throughput": throughput, "latency": latency}[sys.argv[1]])
"""

# The hops that a task makes in the farm, and nothing else: standard input, a thread for the connection, TCP, a slot, a
# pipe to its child, and all the way back. What this takes is the machine's.
CHAIN = """
import multiprocessing, os, socket, sys, threading

def run_child(pipe):
    while True:
        pipe.send_bytes(pipe.recv_bytes())

def run_slot(port):
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.Process(target=run_child, args=(theirs,), daemon=True).start()
    while data := sock.recv(65536):
        ours.send_bytes(data)
        sock.send(ours.recv_bytes())

def serve(sock, arrived, lines):
    while True:
        with arrived:
            arrived.wait_for(lambda: lines)
            data = lines.pop()
        sock.send(data)
        os.write(1, sock.recv(65536))

if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    multiprocessing.Process(target=run_slot, args=(listener.getsockname()[1],)).start()
    sock = listener.accept()[0]
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    arrived, lines = threading.Condition(), []
    threading.Thread(target=serve, args=(sock, arrived, lines), daemon=True).start()
    while data := os.read(0, 65536):
        with arrived:
            lines.append(data)
            arrived.notify()
    sock.shutdown(socket.SHUT_RDWR)
"""

EXECNET = """
import sys, threading, execnet

def work(channel):
    for n in channel:
        channel.send(n * n)

count = int(sys.argv[1])
channels = [execnet.makegateway().remote_exec(work) for _ in range(2)]
def feed():
    for n in range(count):
        channels[n % 2].send(n)
threading.Thread(target=feed).start()
for n in range(count):
    channels[n % 2].receive()
execnet.default_group.terminate(1)
"""

DASK = """
import sys
from distributed import Client, as_completed

if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        for future in as_completed(client.map(lambda n: n * n, range(int(sys.argv[1])))):
            future.result()
"""

# Sleeps that begin when standard input says so.
SLEEPER = """
import sys, time
count, seconds = int(sys.argv[1]), float(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(count):
    time.sleep(seconds)
print("done", flush=True)
"""

# Slots without a child: each thread leases and reports as task_worker's slots do, and runs nothing.
CLIENTS = """
import os, random, sys, threading, time
sys.path.insert(0, sys.argv[1])
from task_worker import RESULTS, TASKS, Link, pack

def connect(address, key):
    for attempt in range(8):
        try:
            return Link(address, key, f"light/{os.getpid()}")
        except (OSError, EOFError):  # too many at once: again, as a worker does
            time.sleep(random.uniform(0.5, 1.0) * min(2.0, 0.1 * 2**attempt))
    os._exit(1)

def serve(address, key):
    link = connect(address, key)
    os.write(1, b"connected\\n")  # at once, unlike print
    limit = 1
    while (lease := link.exchange(pack(f"{TASKS} lease {limit} 40.0"))) is not None:
        if lease:
            began_at = time.monotonic()
            lines = lease.split("\\n")
            ids = " ".join([line.partition(" ")[0] for line in lines])
            text = "\\n".join([ids, *['"result": null, "seconds": 0.000001'] * len(lines)])
            spent = time.monotonic() - began_at
            link.exchange(pack(f"{RESULTS} report {link.run_id} {spent}", text))
            limit = max(1, min(8 * limit, int(0.2 * len(lines) / max(spent, 1e-6))))

threading.stack_size(256 << 10)
address, key = ("127.0.0.1", int(sys.argv[2])), os.environ["TASK_AUTHKEY"].encode()
threads = [threading.Thread(target=serve, args=(address, key)) for _ in range(int(sys.argv[3]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""

PROGRAMS = {"functions": FUNCTIONS, "pool": POOL, "run": RUN, "tutorial": TUTORIAL, "chain": CHAIN, "execnet_one": EXECNET,
            "dask_one": DASK, "sleeper": SLEEPER, "clients": CLIENTS}  # fmt: skip


class Row(NamedTuple):
    """A line of the table. The ratio is that of the measured value to what the goal names."""

    figure: str
    measured: str
    goal: str
    ratio: float | None = None
    met: bool | None = None  # None: there is no goal, the number is only stated


class Bench(NamedTuple):
    """What every figure needs: how much to do, and a folder with the programs in it."""

    runs: int
    quick: bool
    folder: Path
    env: dict[str, str]

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def program(self, name: str, *arguments: object) -> list[str]:
        return [sys.executable, self.path(f"{name}.py"), *map(str, arguments)]

    def start(self, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, cwd=self.folder, env=self.env, **options)

    def time_program(self, argv: list[str]) -> float:
        """Seconds from the command to its exit, which must be a success."""
        began_at = time.perf_counter()
        with self.start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert process.stderr
            errors = process.stderr.read()
        if process.returncode:
            raise SystemExit(f"benchmark: {argv} ended with status {process.returncode}: {errors.decode()}")
        return time.perf_counter() - began_at

    def interleave(self, contenders: dict[str, Callable[[], float]], runs: int | None = None) -> dict[str, float]:
        """The median that each contender gives in some runs, in which they take turns."""
        values: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(runs or self.runs):
            for name, measure in contenders.items():
                values[name].append(measure())
        for name, got in values.items():
            print(f"  {name}: {', '.join(f'{value:.4g}' for value in got)}", flush=True)
        return {name: statistics.median(got) for name, got in values.items()}


class Farm:
    """A master whose standard input we write and whose records we read; stops at the end of the `with`."""

    def __init__(self, bench: Bench, *options: object, wrap: tuple[str, ...] = ()) -> None:
        argv = [*wrap, sys.executable, MASTER, "--port", "0", "--tasks", "-", "--results", "-", *map(str, options)]
        pipe = subprocess.PIPE
        self.process = bench.start(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.input, self._output, errors = self.process.stdin, self.process.stdout.fileno(), self.process.stderr
        self._rest = b""
        self.port = 0
        while not self.port:
            line = errors.readline().decode()
            if not line:
                raise SystemExit("benchmark: the master did not start")
            if match := re.search(r"listening on .*:(\d+)$", line):
                self.port = int(match.group(1))
        threading.Thread(target=errors.read, daemon=True).start()  # lest the pipe fills

    def __enter__(self) -> Farm:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0]:
            self.process.kill()
        self.input.close()
        while os.read(self._output, 1 << 20):
            pass
        self.process.wait()

    def send(self, chunks: Iterable[bytes]) -> None:
        """Write tasks, in a thread, since the master stops reading when it has enough."""

        def write() -> None:
            with contextlib.suppress(OSError):
                for chunk in chunks:
                    data = memoryview(chunk)
                    while data:
                        data = data[self.input.write(data) :]

        threading.Thread(target=write, daemon=True).start()

    def records(self, count: int) -> list[bytes]:
        """The next records, as lines; blocks until they are there."""
        lines: list[bytes] = []
        while len(lines) < count:
            chunk = os.read(self._output, 1 << 20)
            if not chunk:
                raise SystemExit("benchmark: the master ended too soon")
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            lines += whole
        self._rest = b"\n".join([*lines[count:], self._rest])
        return lines[:count]

    def time_tasks(self, lines: list[str]) -> tuple[float, list[bytes]]:
        """Seconds from the first task in to the last record out, and the records."""
        began_at = time.perf_counter()
        self.send(["".join(f"{line}\n" for line in lines).encode()])
        records = self.records(len(lines))
        return time.perf_counter() - began_at, records

    def wait_for_slots(self, count: int) -> None:
        """Block until so many slots have run a task: naps, until as many processes have slept."""
        seen: set[int] = set()
        while len(seen) < count:
            seen.update(json.loads(record)["result"] for record in self.time_tasks(["0.1"] * count)[1])

    def memory(self, field: str) -> float:
        """A field of /proc/PID/status (VmRSS, VmHWM), in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"{field}:\s+(\d+) kB", status)
        assert match
        return int(match.group(1)) / 1024

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- figure 1 ------------------------------------------------------------------------------------------------------


def measure_throughput(bench: Bench) -> list[Row]:
    """Tasks a second of `n * n`, JSON Lines in and out, two processes.

    The slow ones get fewer tasks. Tutorial, execnet and dask work on numbers in memory, which spares them the JSON.
    """
    count = write_numbers(bench)
    programs: dict[str, tuple[int, Callable[[int], list[str]]]] = {
        "command line": (count, lambda n: command_line(bench, n)),
        **{
            f"Pool, chunks of {size}": (count, lambda n, size=size: pool_command(bench, n, size))  # type: ignore[misc]
            for size in (1000, 5000, 20_000)
        },
        "tutorial": (count // 50, lambda n: bench.program("tutorial", "throughput", n)),
    }
    if importlib.util.find_spec("execnet"):
        programs["execnet"] = (count // 10, lambda n: bench.program("execnet_one", n))
    if importlib.util.find_spec("distributed"):
        programs["dask"] = (count // 250, lambda n: bench.program("dask_one", n))

    rates = bench.interleave({name: (lambda given=given: measure_rate(bench, *given)) for name, given in programs.items()})  # type: ignore[misc]
    ours = rates.pop("command line")
    pool = max((name for name in rates if name.startswith("Pool")), key=rates.__getitem__)
    goals = {pool: 1.0, "tutorial": 20.0, "execnet": 3.0, "dask": None}
    rows = [Row("1 throughput", f"{ours:,.0f} tasks/s", "", None, None)]
    for name, goal in goals.items():
        if name in rates:
            text = f"{goal or ''} x {name} ({rates[name]:,.0f})" if goal else f"({name}: {rates[name]:,.0f})"
            ratio = ours / rates[name]
            rows.append(Row("", "", f"at least {text}" if goal else text, ratio, ratio >= goal if goal else None))
    return rows


def measure_python(bench: Bench) -> list[Row]:
    """`TaskMaster.run` beside the command line, in turn, since the speed of the machine drifts."""
    count = write_numbers(bench)
    contenders = {
        "command line": lambda: measure_rate(bench, count, lambda n: command_line(bench, n)),
        "TaskMaster.run": lambda: measure_rate(bench, count, lambda n: bench.program("run", ROOT, n)),
    }
    ours, ran = bench.interleave(contenders, max(7, bench.runs)).values()
    goal = f"at least 0.8 x command line ({ours:,.0f})"
    return [Row("1 TaskMaster.run", f"{ran:,.0f} tasks/s", goal, ran / ours, ran >= 0.8 * ours)]


def write_numbers(bench: Bench) -> int:
    """Write files of ten and of many tasks; returns how many these are."""
    count = 200_000 if bench.quick else 1_000_000
    for number in (10, count):
        (bench.folder / f"{number}.jsonl").write_text("".join(f"{n}\n" for n in range(number)))
    return count


def measure_rate(bench: Bench, count: int, command: Callable[[int], list[str]]) -> float:
    """Tasks a second, without the start-up: the time that the same command takes with ten tasks."""
    start_up = bench.time_program(command(10))
    return (count - 10) / (bench.time_program(command(count)) - start_up)


def command_line(bench: Bench, count: int) -> list[str]:
    results = Path(bench.path("results.jsonl"))
    results.unlink(missing_ok=True)
    options = ["--port", "0", "--workers", "2", "--function", "functions:square", "--results", str(results)]
    return [sys.executable, MASTER, "--tasks", bench.path(f"{count}.jsonl"), *options]


def pool_command(bench: Bench, count: int, chunk_size: int) -> list[str]:
    return bench.program("pool", bench.path(f"{count}.jsonl"), bench.path("pool_results.jsonl"), chunk_size)


# ---- figure 2 ------------------------------------------------------------------------------------------------------


def measure_latency(bench: Bench) -> list[Row]:
    """Milliseconds from a line in to its record out, one task at a time through two idle slots."""
    count = 100 if bench.quick else 400

    def tutorial() -> float:
        argv = bench.program("tutorial", "latency", count)
        output = subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        return statistics.median(map(float, output.split())) * 1000

    def chain() -> float:
        pipe = subprocess.PIPE
        with bench.start(bench.program("chain"), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0) as process:
            assert process.stdin and process.stdout
            times = time_lines(process.stdin.write, lambda: process.stdout.read(100), count)  # type: ignore[union-attr]
            process.stdin.close()
        return times

    times = bench.interleave({"master": lambda: time_round_trips(bench, count), "tutorial": tutorial, "chain": chain})
    ours, theirs = times["master"], times["tutorial"]
    return [
        Row("2 latency", f"{ours:.2f} ms", "at most 0.6 ms", ours / 0.6, ours <= 0.6),
        Row("", "", f"at most 4.0 x tutorial ({theirs:.2f})", ours / theirs, ours <= 4 * theirs),
        Row("", "", f"(its hops alone: {times['chain']:.2f})", ours / times["chain"]),
    ]


def measure_tls(bench: Bench) -> list[Row]:
    """What `--tls` costs in throughput and in latency; needs a Python that has it."""
    if not getattr(ssl, "HAS_PSK", False):
        return [Row("tls", "needs Python 3.13", "", None, None)]
    count, trips = (200_000, 100) if bench.quick else (1_000_000, 400)
    Path(bench.path(f"{count}.jsonl")).write_text("".join(f"{n}\n" for n in range(count)))
    plain = command_line(bench, count)
    contenders = {"plain": plain, "--tls": [*plain, "--tls"]}

    def run(argv: list[str]) -> float:
        command_line(bench, count)  # removes the results of the last run
        return count / bench.time_program(argv)

    rates = bench.interleave({name: (lambda argv=argv: run(argv)) for name, argv in contenders.items()})  # type: ignore[misc]
    times = bench.interleave(
        {"plain": lambda: time_round_trips(bench, trips), "--tls": lambda: time_round_trips(bench, trips, "--tls")}
    )
    return [
        Row(
            "tls, throughput",
            f"{rates['--tls']:,.0f} tasks/s",
            f"(plain: {rates['plain']:,.0f})",
            rates["--tls"] / rates["plain"],
            None,
        ),
        Row("tls, latency", f"{times['--tls']:.2f} ms", f"(plain: {times['plain']:.2f})", times["--tls"] / times["plain"], None),
    ]


def time_round_trips(bench: Bench, count: int, *options: str) -> float:
    """The median for one task, in milliseconds."""
    with Farm(bench, "--workers", 2, "--function", "functions:square", *options) as farm:
        return time_lines(farm.input.write, lambda: farm.records(1), count)


def time_lines(write: Callable[[bytes], object], read: Callable[[], object], count: int) -> float:
    """The median time from a line that is written to what is read then, in milliseconds."""
    times = []
    for n in range(count + 20):
        time.sleep(0.005)  # all is idle again
        began_at = time.perf_counter()
        write(b"%d\n" % n)
        read()
        times.append(time.perf_counter() - began_at)
    return statistics.median(times[20:]) * 1000


# ---- figure 3 ------------------------------------------------------------------------------------------------------


def measure_overhead(bench: Bench) -> list[Row]:
    """Seconds for short sleeps on four slots that are connected, and for sleeps of mixed lengths."""
    count = 500 if bench.quick else 2000
    with Farm(bench, "--workers", 4, "--function", "functions:nap") as farm:
        farm.wait_for_slots(4)
        sleeps = {
            "farm": lambda: farm.time_tasks(["0.005"] * count)[0],
            "bare": lambda: time_bare_sleeps(bench, count // 4, 0.005),
        }
        seconds = bench.interleave(sleeps, max(5, bench.runs))
        ours, bare = seconds["farm"], seconds["bare"]
        rng = random.Random(1)
        naps = [rng.uniform(0.001, 1.0) for _ in range(40 if bench.quick else 200)]
        mixed = bench.interleave({"mixed": lambda: farm.time_tasks([f"{nap:.6f}" for nap in naps])[0]}, min(2, bench.runs))[
            "mixed"
        ]
    best = max(sum(naps) / 4, max(naps))
    return [
        Row(f"3 {count} x 5 ms", f"{ours:.3f} s", f"at most 1.02 x bare ({bare:.3f})", ours / bare, ours <= 1.02 * bare),
        Row(f"3 {len(naps)} mixed", f"{mixed:.2f} s", f"at most 1.1 x best ({best:.2f})", mixed / best, mixed <= 1.1 * best),
    ]


def time_bare_sleeps(bench: Bench, count: int, seconds: float) -> float:
    """Of four processes that do nothing else, from the word to the last."""
    pipe = subprocess.PIPE
    sleepers = [bench.start(bench.program("sleeper", count, seconds), stdin=pipe, stdout=pipe, bufsize=0) for _ in range(4)]
    for sleeper in sleepers:
        assert sleeper.stdout and sleeper.stdout.readline() == b"ready\n"
    began_at = time.perf_counter()
    for sleeper in sleepers:
        assert sleeper.stdin
        sleeper.stdin.write(b"go\n")
    for sleeper in sleepers:
        assert sleeper.stdout and sleeper.stdout.readline() == b"done\n"
    spent = time.perf_counter() - began_at
    for sleeper in sleepers:
        sleeper.communicate()
    return spent


# ---- figure 4 ------------------------------------------------------------------------------------------------------


def measure_distance(bench: Bench) -> list[Row]:
    """The share of two slots' time that goes to tasks of 5 ms, the master 50 ms away, from the first task to the last record."""
    count, naps = (1000, 2) if bench.quick else (6000, 2)
    shares = []
    for _ in range(1 if bench.quick else min(2, bench.runs)):
        with contextlib.ExitStack() as stack:
            path = find_path(bench, stack)
            farm = stack.enter_context(Farm(bench, "--host", path.listen))
            port = path.open(farm.port)
            options = ["--processes", str(naps), "--function", "functions:nap", "--host", path.host, "--port", str(port)]
            worker = bench.start(
                [*path.wrap, sys.executable, WORKER, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(worker.wait)
            farm.wait_for_slots(naps)
            spent, records = farm.time_tasks(["0.005"] * count)
            shares.append(sum(json.loads(record)["seconds"] for record in records) / (spent * naps))
            farm.input.close()
    share = statistics.median(shares)
    print(f"  share by {path.name}: {', '.join(f'{value:.3f}' for value in shares)}")
    return [Row(f"4 distance, {path.name}", f"{share:.1%} in tasks", "at least 90 %", share / 0.9, share >= 0.9)]


class Path50(NamedTuple):
    """A way from a worker to the master that takes 50 ms there and back."""

    name: str
    listen: str  # where the master listens
    host: str  # what the worker connects to
    wrap: tuple[str, ...]  # what the worker's command begins with
    open: Callable[[int], int]  # from the master's port to the worker's


def find_path(bench: Bench, stack: contextlib.ExitStack) -> Path50:
    """`tc netem` on a link into a network namespace where that can be made, else a relay that holds everything back."""
    name = f"bench{os.getpid()}"
    link = f"v{os.getpid()}"
    commands = f"""ip netns add {name}
ip link add {link} type veth peer name {link}p netns {name}
ip addr add 10.213.7.1/30 dev {link}
ip link set {link} up
ip -n {name} addr add 10.213.7.2/30 dev {link}p
ip -n {name} link set {link}p up
tc qdisc add dev {link} root netem delay 25ms limit 10000
tc -n {name} qdisc add dev {link}p root netem delay 25ms limit 10000"""
    undo = contextlib.ExitStack()
    undo.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)  # takes the link along
    try:
        for command in commands.splitlines():
            subprocess.run(command.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        with contextlib.suppress(OSError):
            undo.close()
        relay = Relay(0.025)
        return Path50("relay", "127.0.0.1", "127.0.0.1", (), relay.start)
    stack.push(undo)
    return Path50("netem", "10.213.7.1", "10.213.7.1", ("ip", "netns", "exec", name), lambda port: port)


class Relay:
    """Forwards connections, each byte `delay` seconds late, as many on the way as there are."""

    def __init__(self, delay: float) -> None:
        self._delay = delay

    def start(self, port: int) -> int:
        """Relay to this port of this host; returns the port to connect to."""
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()
        taken: int = listener.getsockname()[1]
        return taken

    def _accept(self, listener: socket.socket, port: int) -> None:
        while True:
            near = listener.accept()[0]
            far = socket.create_connection(("127.0.0.1", port))
            for source, target in ((near, far), (far, near)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                threading.Thread(target=self._take, args=(source, held), daemon=True).start()
                threading.Thread(target=self._give, args=(held, target), daemon=True).start()

    def _take(self, source: socket.socket, held: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"first"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            held.put((time.monotonic() + self._delay, data))

    def _give(self, held: queue.SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                due_at, data = held.get()
                time.sleep(max(0.0, due_at - time.monotonic()))
                if not data:
                    break
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


# ---- figure 5 ------------------------------------------------------------------------------------------------------


def measure_scale(bench: Bench) -> list[Row]:
    """A thousand connected slots against two, what they cost when idle, and the memory for a long job."""
    count = 100_000 if bench.quick else 500_000
    tasks = [str(n) for n in range(count)]
    with Farm(bench) as few, Farm(bench) as many:
        before = many.memory("VmRSS")
        stop_few, stop_many = start_clients(bench, few, 1, 2), start_clients(bench, many, 4, 250)
        memory = (many.memory("VmRSS") - before) * 1024 / 1000
        spent = many.cpu_seconds()
        time.sleep(10)
        spent = many.cpu_seconds() - spent
        print(f"  the master of 1,000 idle slots: {spent:.2f} s of CPU in 10 s, {many.memory('VmRSS'):.1f} MB")
        rates = bench.interleave({
            "2 slots": lambda: count / few.time_tasks(tasks)[0], "1,000 slots": lambda: count / many.time_tasks(tasks)[0],
        })  # fmt: skip
    stop_few()
    stop_many()
    ratio = rates["1,000 slots"] / rates["2 slots"]
    streamed, first, last = stream_many(bench, 2_000_000 if bench.quick else 10_000_000)
    return [
        Row("5 1,000 slots", f"{rates['1,000 slots']:,.0f} tasks/s",
            f"at least 0.5 x 2 slots ({rates['2 slots']:,.0f})", ratio, ratio >= 0.5),
        Row("5 idle slots", f"{spent:.2f} s CPU in 10 s", "at most 0.1 s", spent / 0.1, spent <= 0.1),
        Row("5 a connection", f"{memory:.0f} KB", ""),
        Row(f"5 memory, {streamed // 1_000_000} M tasks", f"{last:.1f} MB", "at most 80 MB", last / 80, last <= 80),
        Row("", "", f"at most 1.1 x after 1 M ({first:.1f})", last / first, last <= 1.1 * first),
    ]  # fmt: skip


def start_clients(bench: Bench, farm: Farm, processes: int, threads: int) -> Callable[[], None]:
    """Connect light clients; returns when all are in. What it returns waits for their end."""
    argv = bench.program("clients", ROOT, farm.port, threads)
    clients = [bench.start(argv, stdout=subprocess.PIPE) for _ in range(processes)]
    began_at = time.perf_counter()
    for client in clients:
        for _ in range(threads):
            assert client.stdout and client.stdout.readline() == b"connected\n"
    print(f"  {processes * threads} slots connected in {time.perf_counter() - began_at:.1f} s")

    def stop() -> None:
        for client in clients:
            client.communicate()

    return stop


def stream_many(bench: Bench, count: int) -> tuple[int, float, float]:
    """The number of tasks, and the master's peak memory in MB after the first million and at the end."""
    step = 100_000

    def chunks() -> Iterator[bytes]:
        for start in range(0, count, step):
            yield "".join([f"{n}\n" for n in range(start, start + step)]).encode()

    with Farm(bench, "--workers", 2, "--function", "functions:square") as farm:
        peaks = []
        farm.send(chunks())
        for _ in range(0, count, step):
            farm.records(step)
            peaks.append(farm.memory("VmHWM"))
    print(f"  peak memory by million, MB: {', '.join(f'{peak:.1f}' for peak in peaks[9::10])}")
    return count, peaks[9], peaks[-1]


# ---- figure 6 ------------------------------------------------------------------------------------------------------


def measure_cold_start(bench: Bench) -> list[Row]:
    """Seconds from the command to its exit with ten results."""
    argv = [sys.executable, MASTER, "--port", "0", "--workers", "2"]
    empty = [sys.executable, "-c", "pass"]
    runs = 5 if bench.quick else 5 * bench.runs
    seconds = bench.interleave(
        {"command": lambda: bench.time_program(argv), "an empty Python": lambda: bench.time_program(empty)}, runs
    )
    ours = seconds["command"]
    return [
        Row("6 cold start", f"{ours:.3f} s", "at most 0.6 s", ours / 0.6, ours <= 0.6),
        Row("", "", f"(an empty Python: {seconds['an empty Python']:.3f})", ours / seconds["an empty Python"]),
    ]


# ---- command line --------------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[Bench], list[Row]]] = {
    "throughput": measure_throughput,
    "python": measure_python,
    "latency": measure_latency,
    "overhead": measure_overhead,
    "distance": measure_distance,
    "scale": measure_scale,
    "cold-start": measure_cold_start,
    "tls": measure_tls,
}


def print_table(rows: list[Row]) -> None:
    met = {True: "yes", False: "NO", None: ""}
    cells = [("figure", "measured", "goal", "ratio", "met")]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells.append((row.figure, row.measured, row.goal, ratio, met[row.met]))
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    print()
    for line in cells:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmark", description="Measure how fast the farm is.")
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="NAME", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="give the median of N runs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="do less, to see that it works")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        for program, text in PROGRAMS.items():
            (folder / f"{program}.py").write_text(text)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TASK_", "PYTHON"))}
        env = {**inherited, "HOME": name, "TASK_AUTHKEY": secrets.token_hex(16)}
        bench = Bench(options.runs, options.quick, folder, env)
        for figure in options.only or FIGURES:
            print(f"{figure}...", flush=True)
            rows += FIGURES[figure](bench)
    cpus = len(os.sched_getaffinity(0))
    print(f"\nPython {sys.version.split()[0]}, {cpus} CPUs, {sys.platform}, median of {options.runs}")
    print_table(rows)
    return 0 if all(row.met is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

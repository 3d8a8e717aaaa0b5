#!/usr/bin/env python3
"""Measures the farm beside what one might use instead, or beside another version of itself. Run by hand:

    python tests/benchmark.py                                       all rows but the night: some hours
    python tests/benchmark.py throughput command --runs 9           these rows alone
    python tests/benchmark.py latency --product . --product ../old  two versions, in turn
    python tests/benchmark.py memory --scale 0.1                    a tenth of the work
    python tests/benchmark.py night --scale 0.1                     six minutes instead of an hour

Each row is one function below, which names contenders. They take turns in each round. The table gives the median over the
rounds, and the ratio of each product to each contender: the median of the ratios within a round, since the speed of a machine
drifts. A contender that fails (execnet is not installed, say) is skipped with its reason. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import re
import secrets
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import psutil

MB = 1 << 20
Values = dict[str, float]  # what a contender gave in a round, by figure; the name of a figure is its unit
Contenders = dict[str, Callable[[], Values]]

PROGRAMS = {
    # What the farm runs. A number with a point is a nap; the file that it leaves tells that this process takes part.
    "functions": """
import os, sys, time

def square(n):
    return n * n

def work(task):
    if not isinstance(task, float):
        return task
    mark = f"joined/{os.getpid()}"
    if not os.path.exists(mark):
        open(mark, "w").close()
    time.sleep(task)

def dream(task):
    kind, value = task
    kinds = {"nap": time.sleep, "print": print, "big": "x".__mul__, "fail": int, "exit": sys.exit, "die": os._exit}
    return kinds[kind](value)
""",
    "pool": """
import json, multiprocessing, os, sys, time

def work(numbered_line):
    number, line = numbered_line
    task = json.loads(line)
    started_at = time.perf_counter()
    record = {"id": number, "task": task, "result": task * task, "seconds": round(time.perf_counter() - started_at, 6)}
    return json.dumps({**record, "worker": name, "attempts": 1}) + "\\n"

name = f"host/{os.getpid()}"
if __name__ == "__main__":
    with open(sys.argv[1]) as tasks, open(sys.argv[2], "w") as results, multiprocessing.Pool(2) as pool:
        results.writelines(pool.imap_unordered(work, enumerate(tasks), int(sys.argv[3])))
""",
    "run": """
import sys
sys.path.insert(0, sys.argv[1])
from task_master import TaskMaster

if __name__ == "__main__":
    with TaskMaster(port=0, workers=2, function="functions:square") as master:
        for record in master.run(range(int(sys.argv[2]))):
            assert record.result == record.task * record.task
""",
    "tutorial": """
import multiprocessing, queue, sys, time
from multiprocessing.managers import BaseManager

tasks, results = queue.Queue(), queue.Queue()
class QueueManager(BaseManager): pass
QueueManager.register("get_task_queue", callable=lambda: tasks)
QueueManager.register("get_result_queue", callable=lambda: results)

def work(address):
    manager = QueueManager(address, b"abc")
    manager.connect()
    tasks, results = manager.get_task_queue(), manager.get_result_queue()
    while True:
        n = tasks.get()
        results.put(n * n)

def use(tasks, results, count, pause):
    for n in range(count):
        time.sleep(pause)
        asked_at = time.perf_counter()
        tasks.put(n)
        if pause:
            results.get()
            print(time.perf_counter() - asked_at)
    for n in range(0 if pause else count):
        results.get()

if __name__ == "__main__":
    with QueueManager(("127.0.0.1", 0), b"abc", ctx=multiprocessing.get_context("fork")) as manager:
        for _ in range(2):
            multiprocessing.Process(target=work, args=(manager.address,), daemon=True).start()
        use(manager.get_task_queue(), manager.get_result_queue(), int(sys.argv[1]), float(sys.argv[2]))
""",
    # The hops that a task makes in the farm, and nothing else: standard input, a thread for the connection, TCP, a slot,
    # a pipe to its child, and all the way back. What this takes is the machine's.
    "hops": """
import multiprocessing, os, queue, socket, threading

def run_child(pipe):
    while True:
        pipe.send_bytes(pipe.recv_bytes())

def run_slot(address):
    sock = socket.create_connection(address)
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.Process(target=run_child, args=(theirs,)).start()
    while True:
        ours.send_bytes(sock.recv(65536))
        sock.send(ours.recv_bytes())

def serve(sock, lines):
    while True:
        sock.send(lines.get())
        os.write(1, sock.recv(65536))

if __name__ == "__main__":
    listener, lines = socket.create_server(("127.0.0.1", 0)), queue.Queue()
    multiprocessing.Process(target=run_slot, args=(listener.getsockname(),)).start()
    threading.Thread(target=serve, args=(listener.accept()[0], lines), daemon=True).start()
    while True:
        lines.put(os.read(0, 65536))
""",
    "execnet_pair": """
import sys, threading, execnet

def work(channel):
    for n in channel:
        channel.send(n * n)

def feed():
    for n in range(count):
        channels[n % 2].send(n)

count = int(sys.argv[1])
channels = [execnet.makegateway().remote_exec(work) for _ in range(2)]
threading.Thread(target=feed).start()
for n in range(count):
    channels[n % 2].receive()
execnet.default_group.terminate(1)
""",
    "dask_pair": """
import sys
from distributed import Client, as_completed

if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        for future in as_completed(client.map(lambda n: n * n, range(int(sys.argv[1])))):
            future.result()
""",
    "echo": """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sock = listener.accept()[0]
while data := sock.recv(1 << 20):
    sock.sendall(data)
""",
    # Forwards connections to a port, each byte some seconds late, as many on the way as there are.
    "relay": """
import asyncio, sys
target, delay, port = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])

async def forward(reader, writer):
    data = b"first"
    while data:
        try:
            data = await reader.read(1 << 16)
        except OSError:
            data = b""
        asyncio.get_running_loop().call_later(delay, *((writer.write, data) if data else (writer.close,)))

async def relay(reader, writer):
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(forward(reader, far_writer), forward(far_reader, writer))
    except OSError:
        writer.close()

async def main():
    server = await asyncio.start_server(relay, "127.0.0.1", port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
""",
    # Runs a program on a disk whose every fsync takes 50 ms longer; or lets it fork its children instead of spawning them, so
    # that a thousand start in seconds. (Where a product makes its children in another way, they are as heavy as always.)
    "altered": """
import multiprocessing.context, multiprocessing.popen_fork, os, runpy, sys, time, warnings
import hashlib, hmac, traceback  # now, since a fork while a thread imports one leaves its lock held in the child
fsync = os.fsync
if sys.argv[1] == "slow_fsync":
    os.fsync = os.fdatasync = lambda fd: time.sleep(0.05) or fsync(fd)
else:
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
    multiprocessing.context.SpawnProcess._Popen = multiprocessing.popen_fork.Popen
del sys.argv[:2]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
""",
}

# ---- helpers -------------------------------------------------------------------------------------------------------


class Skip(Exception):
    """A contender cannot take part, for this reason."""


class Product(NamedTuple):
    """A version of the two files, used through its command line."""

    name: str
    folder: Path

    def master(self, *options: object) -> list[str]:
        return [sys.executable, str(self.folder / "task_master.py"), "--port", "0", *map(str, options)]

    def worker(self, port: int, processes: int, function: str = "functions:work") -> list[str]:
        options = ["--quiet", "--port", port, "--processes", processes, "--function", function]
        return [sys.executable, str(self.folder / "task_worker.py"), *map(str, options)]


class Lab:
    """What every row needs: the products, how much to do, and a folder in which all programs run."""

    def __init__(self, folder: Path, products: list[Product], scale: float) -> None:
        self.folder, self.products, self.scale = folder, products, scale
        self.results, self._joined = folder / "results.jsonl", folder / "joined"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TASK_", "PYTHON"))}
        self._env = {**inherited, "HOME": str(folder), "TASK_AUTHKEY": secrets.token_hex(16)}
        self._joined.mkdir()
        for name, text in PROGRAMS.items():
            (folder / f"{name}.py").write_text(text)

    def count(self, number: int, least: int = 20) -> int:
        """This number, scaled as the user asks."""
        return max(least, int(number * self.scale))

    def ours(self, measure: Callable[[Product], Values], variant: str = "") -> Contenders:
        """A contender for each product."""
        return {product.name + variant: functools.partial(measure, product) for product in self.products}

    def program(self, name: str, *arguments: object) -> list[str]:
        return [sys.executable, f"{name}.py", *map(str, arguments)]

    def numbers(self, count: int) -> Path:
        """A file of so many tasks."""
        path = self.folder / f"{count}.jsonl"
        if not path.exists():
            path.write_text("".join([f"{n}\n" for n in range(count)]))
        return path

    def job(self, product: Product, count: int, *options: object) -> list[str]:
        """A command that takes tasks from a file, on two processes, and makes a results file anew."""
        self.results.unlink(missing_ok=True)
        what = options if "--command" in options else ("--function", "functions:square", *options)
        return product.master("--tasks", self.numbers(count), "--workers", 2, "--results", self.results, *what)

    @contextlib.contextmanager
    def running(self, argv: list[str], **options: Any) -> Iterator[psutil.Popen]:
        """A process that is killed at the end of the `with`, and all below it."""
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
        try:
            process = psutil.Popen(argv, cwd=self.folder, env=self._env, **options)
        except FileNotFoundError:
            raise Skip(f"there is no {argv[0]}") from None
        try:
            yield process
        finally:
            kill_tree(process)

    @contextlib.contextmanager
    def farm(self, product: Product, *options: object) -> Iterator[Farm]:
        """A master that reads tasks from its standard input and writes records to its standard output."""
        argv, pipe = product.master("--tasks", "-", "--results", "-", *options), subprocess.PIPE
        with self.running(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=MB) as process:
            line = said = b""
            while b"listening on" not in line:
                said, line = line, process.stderr.readline()
                if not line:
                    raise Skip(f"the master ended: {said.decode().strip()}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # so that the pipe never fills
            yield Farm(process, int(line.rpartition(b":")[2]), process.stdin, process.stdout)

    @contextlib.contextmanager
    def relay(self, target: int, delay: float = 0.0, port: int = 0) -> Iterator[int]:
        """A relay to the master that holds each byte back; gives the port to connect to."""
        with self.running(self.program("relay", target, delay, port), stdout=subprocess.PIPE) as process:
            yield int(read_line(process.stdout))

    def forget_joined(self) -> None:
        for mark in self._joined.iterdir():
            mark.unlink()

    def joined(self) -> int:
        """How many processes have run a nap (of functions:work) since that was forgotten."""
        return len(os.listdir(self._joined))

    def wait_for(self, farm: Farm, count: int) -> None:
        """Block until so many processes have joined a farm."""
        self.forget_joined()
        while self.joined() < count:
            farm.seconds([b"0.1\n" * (4 * count)], 4 * count)

    def seconds(self, argv: list[str]) -> float:
        """From the command to its exit."""
        errors = self.folder / "errors"
        began_at = time.perf_counter()
        with errors.open("wb") as file, self.running(argv, stdin=subprocess.DEVNULL, stderr=file) as process:
            status = process.wait()
            spent = time.perf_counter() - began_at
        if status:
            raise Skip(f"exit status {status}: {' '.join(errors.read_text().splitlines()[-1:])}")
        return spent

    def rate(self, command: Callable[[int], list[str]], count: int) -> Values:
        """Tasks a second, without the start-up: the time that the same command takes with ten tasks."""
        count, start_up = max(count, 20), self.seconds(command(10))
        spent = self.seconds(command(count)) - start_up
        if spent <= 0:
            raise Skip(f"{count} tasks take no longer than ten: use a larger --scale")
        return {"tasks/s": (count - 10) / spent}

    def square_rate(self, product: Product, *options: object) -> Values:
        return self.rate(lambda count: self.job(product, count, *options), self.count(1_000_000))


class Farm(NamedTuple):
    """A master whose standard input we write and whose records we read."""

    process: psutil.Popen
    port: int
    input: Any
    output: Any

    def write(self, line: bytes) -> None:
        self.input.write(line)
        self.input.flush()

    def send(self, chunks: Iterable[bytes]) -> None:
        """Write tasks, in a thread, since the master stops reading when it has enough."""

        def write_all() -> None:
            with contextlib.suppress(OSError):  # the master is gone
                for chunk in chunks:
                    self.write(chunk)

        threading.Thread(target=write_all, daemon=True).start()

    def skip_records(self, count: int) -> None:
        """Block until so many records are there."""
        for _ in range(count):
            read_line(self.output)

    def seconds(self, chunks: Iterable[bytes], count: int) -> float:
        """From the first task in to the last record out."""
        began_at = time.perf_counter()
        self.send(chunks)
        self.skip_records(count)
        return time.perf_counter() - began_at


def read_line(stream: Any) -> bytes:
    if not (line := stream.readline()):
        raise Skip("a program ended too soon")
    return line


def kill_tree(process: psutil.Popen) -> None:
    """Kill a process and all below it; blocks until they are gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [process, *process.children(recursive=True)]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(tree, timeout=10)


def peak_memory(pid: int) -> float:
    """MB that a process has occupied at most; 0 when it is gone."""
    with contextlib.suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return int(match.group(1)) / 1024
    return 0.0


def cpu_seconds(process: psutil.Popen) -> float:
    """What a process has used, without its children."""
    return sum(process.cpu_times()[:2])


# ---- rows: each takes the lab and names its contenders -------------------------------------------------------------


def measure_throughput(lab: Lab) -> Contenders:
    """Tasks of `n * n`, JSON Lines in and out, two processes.

    The slow rivals get fewer tasks. Tutorial, execnet and dask work on numbers in memory, which spares them the JSON.
    """
    count = lab.count(1_000_000)

    def pool(size: int) -> float:
        return lab.rate(lambda n: lab.program("pool", lab.numbers(n), "pool.jsonl", size), count)["tasks/s"]

    return {
        **lab.ours(lab.square_rate),
        "Pool, best of three chunk sizes": lambda: {"tasks/s": max(map(pool, (1000, 5000, 20_000)))},
        "the tutorial's pair": lambda: lab.rate(lambda n: lab.program("tutorial", n, 0), count // 50),
        "execnet": lambda: lab.rate(lambda n: lab.program("execnet_pair", n), count // 10),
        "dask": lambda: lab.rate(lambda n: lab.program("dask_pair", n), count // 250),
    }


def measure_python(lab: Lab) -> Contenders:
    """`TaskMaster.run` beside the command line."""

    def run(product: Product) -> Values:
        return lab.rate(lambda n: lab.program("run", product.folder, n), lab.count(1_000_000))

    return {**lab.ours(run), **lab.ours(lab.square_rate, ", command line")}


def measure_tls(lab: Lab) -> Contenders:
    """Throughput and latency with `--tls`, beside without."""

    def measure(product: Product, *options: str) -> Values:
        return {**lab.square_rate(product, *options), **time_single_tasks(lab, product, *options)}

    return {**lab.ours(lambda product: measure(product, "--tls")), **lab.ours(measure, ", plain")}


def measure_stalls(lab: Lab) -> Contenders:
    """Throughput on a disk whose every fsync takes 50 ms more, beside without."""

    def measure(product: Product) -> Values:
        return lab.rate(lambda n: lab.program("altered", "slow_fsync", *lab.job(product, n)[1:]), lab.count(1_000_000))

    return {**lab.ours(measure), **lab.ours(lab.square_rate, ", the disk as it is")}


def measure_latency(lab: Lab) -> Contenders:
    """From a line in to its record out, one task at a time through two idle processes."""

    def tutorial() -> Values:
        with lab.running(lab.program("tutorial", lab.count(400) + 20, 0.005), stdout=subprocess.PIPE) as process:
            return {"ms": statistics.median(map(float, process.stdout.read().split()[20:])) * 1000}

    def hops() -> Values:
        with lab.running(lab.program("hops"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            output = process.stdout
            return time_lines(process.stdin.write, lambda: read_line(output), lab.count(400))

    return {**lab.ours(lambda product: time_single_tasks(lab, product)), "the tutorial's pair": tutorial, "its hops alone": hops}


def time_single_tasks(lab: Lab, product: Product, *options: str) -> Values:
    with lab.farm(product, "--workers", 2, "--function", "functions:square", *options) as farm:
        farm.seconds([b"0\n" * 100], 100)
        return time_lines(farm.write, lambda: farm.skip_records(1), lab.count(400))


def time_lines(write: Callable[[bytes], object], read: Callable[[], object], count: int) -> Values:
    """The median time from a line that is written to what is read then."""
    times = []
    for n in range(count + 20):
        time.sleep(0.005)  # all is idle again
        began_at = time.perf_counter()
        write(b"%d\n" % n)
        read()
        times.append(time.perf_counter() - began_at)
    return {"ms": statistics.median(times[20:]) * 1000}


def measure_naps(lab: Lab) -> Contenders:
    """Naps of 5 ms and of up to a second on four processes, and naps of 5 ms on two that are a round trip of 50 ms away."""
    rng = random.Random(1)
    short, mixed = [0.005] * lab.count(2000), [rng.uniform(0.001, 1.0) for _ in range(lab.count(200))]
    scenes = {"s, short": (short, 4, 0.0), "s, mixed": (mixed, 4, 0.0), "s, far away": (3 * short, 2, 0.025)}

    def measure(product: Product, naps: list[float], processes: int, delay: float) -> float:
        with lab.farm(product) as farm, contextlib.ExitStack() as stack:
            port = stack.enter_context(lab.relay(farm.port, delay)) if delay else farm.port
            stack.enter_context(lab.running(product.worker(port, processes)))
            lab.wait_for(farm, processes)
            return farm.seconds([b"%.6f\n" % nap for nap in naps], len(naps))

    best = {name: max(sum(naps) / processes, max(naps)) for name, (naps, processes, _) in scenes.items()}
    ours = lab.ours(lambda product: {name: measure(product, *scene) for name, scene in scenes.items()})
    return {**ours, "the best schedule": lambda: best}


def measure_slots(lab: Lab) -> Contenders:
    """A thousand connected processes beside two, for the first tasks and later on, and what they cost the master when idle."""
    count, many = lab.count(500_000), lab.count(250, 2)

    def measure(product: Product, workers: int, processes: int) -> Values:
        with lab.farm(product) as farm, contextlib.ExitStack() as stack:
            worker = lab.program("altered", "fork", *product.worker(farm.port, processes)[1:])
            before = farm.process.memory_info().rss
            for _ in range(workers):
                stack.enter_context(lab.running(worker))
            lab.wait_for(farm, workers * processes)
            grown, used = farm.process.memory_info().rss - before, cpu_seconds(farm.process)
            time.sleep(10)
            idle = 10 * (cpu_seconds(farm.process) - used)
            first, later = [count / farm.seconds([b"%d\n" % n for n in range(count)], count) for _ in range(2)]
        return {
            "tasks/s, first": first,
            "tasks/s, later": later,
            "% of a core, idle": idle,
            "KB a process": grown / 1024 / workers / processes,
        }

    return {**lab.ours(lambda product: measure(product, 4, many)), **lab.ours(lambda product: measure(product, 1, 2), ", two")}


def measure_memory(lab: Lab) -> Contenders:
    """The master's peak memory while ten million tasks pass through: after a tenth of them, and at the end."""
    step = lab.count(1_000_000)

    def measure(product: Product) -> Values:
        with lab.farm(product, "--workers", 2, "--function", "functions:square") as farm:
            farm.send("".join([f"{n}\n" for n in range(start, start + step)]).encode() for start in range(0, 10 * step, step))
            farm.skip_records(step)
            early = peak_memory(farm.process.pid)
            farm.skip_records(9 * step)
            return {"MB at most, first tenth": early, "MB at most": peak_memory(farm.process.pid)}

    return lab.ours(measure)


def measure_cold(lab: Lab) -> Contenders:
    """From the command to its exit, the demonstration with two processes; the median of five in each round."""

    def measure(argv: list[str]) -> Values:
        return {"s": statistics.median(lab.seconds(argv) for _ in range(5))}

    empty = [sys.executable, "-c", "pass"]
    return {**lab.ours(lambda product: measure(product.master("--workers", 2))), "an empty Python": lambda: measure(empty)}


def measure_command(lab: Lab) -> Contenders:
    """5,000 shell commands that do nothing, on two processes, without the start-up."""
    count = lab.count(5000, 200)

    def rival(command: str, share: int) -> Callable[[], Values]:
        return lambda: lab.rate(lambda n: shlex.split(command.format(lab.numbers(n))), count // share)

    return {
        **lab.ours(lambda product: lab.rate(lambda n: lab.job(product, n, "--command", "true {}"), count)),
        "xargs -P2 -n1 sh -c": rival("xargs -a {} -P2 -n1 sh -c true", 1),
        "GNU parallel": rival("parallel -j2 -a {} true", 2),
        "HyperShell": rival("hyper-shell cluster {} --no-db -N2 -t 'true {{}}'", 5),
    }


def measure_big(lab: Lab) -> Contenders:
    """200 tasks and results of 10 MiB, through one master."""
    count, line = lab.count(200, 4), b'"%s"\n' % (b"x" * (10 * MB))

    def measure(product: Product) -> Values:
        with lab.farm(product, "--workers", 2, "--function", "functions:work") as farm:
            lab.wait_for(farm, 2)
            rate = 10 * count / farm.seconds(itertools.repeat(line, count), count)
            peak, *others = [peak_memory(process.pid) for process in (farm.process, *farm.process.children(recursive=True))]
            return {"MB/s": rate, "MB of the master at most": peak, "MB of another process": max(others)}

    def bare() -> Values:
        with lab.running(lab.program("echo"), stdout=subprocess.PIPE) as process:
            sock = socket.create_connection(("127.0.0.1", int(read_line(process.stdout))))
            began_at = time.perf_counter()
            threading.Thread(target=lambda: [sock.sendall(line) for _ in range(count)], daemon=True).start()
            missing = count * len(line)
            while missing:
                missing -= len(sock.recv(MB))
            return {"MB/s": 10 * count / (time.perf_counter() - began_at)}

    return {**lab.ours(measure), "a bare socket, there and back": bare}


def measure_resume(lab: Lab) -> Contenders:
    """Resuming a job of 2,000,000 tasks, a thousandth of which had failed."""
    count, failed = lab.count(2_000_000, 2000), '"error": {"type": "ValueError", "message": "no", "traceback": ""}'

    def measure(product: Product) -> Values:
        lab.seconds(lab.job(product, 10))
        rest = lab.results.read_text().partition('"task": 7, "result": 49')[2].partition("\n")[0]  # as this version writes it
        argv = lab.job(product, count, "--resume")
        with lab.results.open("w") as file:
            for n in range(count):
                outcome = f'"result": {n * n}' if n % 1000 else failed
                file.write(f'{{"id": {n}, "task": {n}, {outcome}{rest}\n')
        began_at = time.perf_counter()
        with lab.running(argv, stderr=subprocess.PIPE) as master:
            while b"listening on" not in read_line(master.stderr):
                pass
            values = {"s until listening": time.perf_counter() - began_at, "MB of the master at most": peak_memory(master.pid)}
            master.stderr.read()
            return {**values, "s until over": time.perf_counter() - began_at}

    return lab.ours(measure)


def measure_rehearsal(lab: Lab) -> Contenders:
    """64 workers of 4 processes, 20 ms away; half of them are killed and replaced, then the master is killed and resumed."""
    workers, tasks = lab.count(64, 2), lab.folder / "naps.jsonl"
    tasks.write_text("0.05\n" * 1_000_000)

    def wait_for_all() -> float:
        """Seconds until every process of every worker has begun a task."""
        lab.forget_joined()
        began_at = time.perf_counter()
        while lab.joined() < 4 * workers:
            if time.perf_counter() - began_at > 300:
                raise Skip(f"after 300 s only {lab.joined()} of {4 * workers} processes had joined")
            time.sleep(0.02)
        return time.perf_counter() - began_at

    def measure_cpu(master: psutil.Popen) -> float:
        used, written = cpu_seconds(master), lab.results.read_bytes().count(b"\n")
        time.sleep(10)
        return (cpu_seconds(master) - used) * 1e6 / (lab.results.read_bytes().count(b"\n") - written)

    def measure(product: Product) -> Values:
        lab.results.unlink(missing_ok=True)
        with lab.relay(1) as port:  # one that will be free
            pass
        argv = product.master("--tasks", tasks, "--results", lab.results, "--port", port)
        with contextlib.ExitStack() as stack, lab.running(argv) as master, lab.relay(port, 0.01) as near:
            worker = lab.program("altered", "fork", *product.worker(near, 4)[1:])
            started = [stack.enter_context(lab.running(worker)) for _ in range(workers)]
            values = {"s until all have joined": wait_for_all(), "us of the master a task": measure_cpu(master)}
            for process in started[::2]:
                kill_tree(process)
            for _ in started[::2]:
                stack.enter_context(lab.running(worker))
            values["s until the killed are replaced"] = wait_for_all()
            kill_tree(master)
            time.sleep(1)  # what was leased is over
            with lab.running([*argv, "--resume"]):
                values["s until all have joined the next master"] = wait_for_all()
        return values

    return lab.ours(measure)


def measure_night(lab: Lab) -> Contenders:
    """What a master and a worker hold at the end of a night of failures, kills and reconnections, beside early in it."""
    contenders: Contenders = {}
    for product in lab.products:
        samples = sample_night(lab, product)
        for variant, part in (("", samples[-10:]), (", early", samples[5:15])):
            middle = {figure: statistics.median(sample[figure] for sample in part) for figure in samples[0]}
            contenders[product.name + variant] = functools.partial(dict, middle)
    return contenders


def sample_night(lab: Lab, product: Product) -> list[Values]:
    """60 samples of a master and of a worker whose connection is cut after each, as another worker is killed."""
    kinds = [("nap", 0.0)] * 800 + [("nap", 0.02)] * 100 + [("print", 1)] * 50 + [("fail", "no")] * 40
    kinds += [("big", 100_000)] * 5 + [("exit", 1)] * 4 + [("die", 1)] * 2 + [("nap", 9.0)]

    def make_tasks() -> Iterator[bytes]:
        while True:
            yield "".join([json.dumps(task) + "\n" for task in random.choices(kinds, k=50)]).encode()
            time.sleep(0.2)

    def look_at(process: psutil.Popen, name: str) -> Values:
        """What it holds, with all that it has started; tasks that die and time out replace some of these now and then."""
        tree = [process, *process.children(recursive=True)]
        return {
            f"MB of the {name}": sum(one.memory_info().rss for one in tree) / MB, f"processes of the {name}": len(tree),
            f"descriptors of the {name}": sum(one.num_fds() for one in tree),
            f"threads of the {name}": sum(one.num_threads() for one in tree),
        }  # fmt: skip

    lab.results.unlink(missing_ok=True)
    options, samples = ("--results", lab.results, "--timeout", 2, "--retries", 1), []
    with lab.farm(product, *options) as farm, contextlib.ExitStack() as stack, contextlib.ExitStack() as relay:
        near = relay.enter_context(lab.relay(farm.port))
        worker = stack.enter_context(lab.running(product.worker(near, 2, "functions:dream")))
        farm.send(make_tasks())
        for _ in range(60):
            with lab.running(product.worker(farm.port, 2, "functions:dream")):
                time.sleep(60 * lab.scale)  # a sixtieth of the night
                with contextlib.suppress(psutil.NoSuchProcess):  # it just ended
                    samples.append({**look_at(farm.process, "master"), **look_at(worker, "worker")})
            relay.close()
            relay.enter_context(lab.relay(farm.port, port=near))
            print(f"  {lab.results.stat().st_size / MB:.0f} MB of records; {samples[-1:]}", file=sys.stderr, flush=True)
    return samples


ROWS: dict[str, Callable[[Lab], Contenders]] = {
    name.partition("_")[2]: row for name, row in list(globals().items()) if name.startswith("measure_")
}

# ---- rounds and table ----------------------------------------------------------------------------------------------


def take_turns(contenders: Contenders, runs: int) -> tuple[list[dict[str, Values]], dict[str, str]]:
    """What each contender gave in each round, and the reasons of those that cannot take part."""
    rounds: list[dict[str, Values]] = [{} for _ in range(runs)]
    skipped: dict[str, str] = {}
    for number, got in enumerate(rounds, 1):
        for name in [name for name in contenders if name not in skipped]:
            try:
                got[name] = contenders[name]()
            except Skip as reason:
                skipped[name] = str(reason)
            shown = skipped.get(name) or ", ".join(f"{value:.4g} {figure}" for figure, value in got[name].items())
            print(f"  {number} {name}: {shown}", file=sys.stderr, flush=True)
    return [{name: got[name] for name in got if name not in skipped} for got in rounds], skipped


def make_lines(row: str, rounds: list[dict[str, Values]], products: list[str]) -> Iterator[list[str]]:
    """The lines of the table for a row: one for each figure and contender, with the ratio of each other product to it."""
    first = rounds[0]
    for figure in dict.fromkeys(figure for values in first.values() for figure in values):
        for name in [name for name in first if figure in first[name]]:
            median = statistics.median(got[name][figure] for got in rounds)
            line = [row, figure, name, f"{median:,.0f}" if median >= 100 else f"{median:.3g}"]
            for product in products:
                shown = product != name and product in first and all(got[name][figure] for got in rounds)
                ratios = [got[product][figure] / got[name][figure] for got in rounds] if shown else []
                line.append(f"{statistics.median(ratios):.2f}" if shown else "")
            yield line


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmark", description="Measure how fast the farm is.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all but night)")
    parser.add_argument("--product", type=Path, action="append", metavar="DIR", help="a version to measure (default: this one)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="do F times as much (default: %(default)g)")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    products = [Product(str(folder), folder.resolve()) for folder in options.product or [Path(__file__).parent.parent]]
    names = [product.name for product in products]
    missing, table = [], [["row", "figure", "contender", "median", *[f"{name} / it" for name in names]]]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        lab = Lab(Path(folder), products, options.scale)
        try:
            for row in options.rows or [name for name in ROWS if name != "night"]:
                print(f"{row}...", file=sys.stderr, flush=True)
                rounds, skipped = take_turns(ROWS[row](lab), 1 if row == "night" else options.runs)
                table += make_lines(row, rounds, names)
                missing += [f"Not measured: {row}, {name}: {reason}" for name, reason in skipped.items()]
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    cpus = len(os.sched_getaffinity(0))
    print(f"Python {sys.version.split()[0]}, {cpus} CPUs, {sys.platform}, medians of {options.runs}, scale {options.scale:g}\n")
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in [table[0], ["-" * width for width in widths], *table[1:]]:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")
    print("", *missing, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The batch script of the README, in a real Slurm cluster of one node that runs in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable

import psutil
import pytest
from lab import ROOT, Farm, find_block, free_port, is_alive, wait_until

PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
MODULE = "import functions\ndef count(n):\n    return (functions.note if n < 20 else functions.stay)(n)\n"
HOST = socket.gethostname().partition(".")[0]
# When a step gets a signal, proctrack/pgid passes it to what srun has started, as proctrack/cgroup does, which needs more rights
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
AuthInfo=socket={folder}/socket
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
FirstJobId={job}
KillWait=5
ProctrackType=proctrack/pgid
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """munged, slurmctld and slurmd in the folder of a farm, which stops them; takes jobs when it is made."""

    def __init__(self, farm: Farm) -> None:
        if os.geteuid() or not all(shutil.which(name, path=PATH) for name in ("munged", "slurmctld", "slurmd", "srun")):
            pytest.skip("needs root, and slurmctld, slurmd, slurm-client and munge, which are not all here")
        self._farm = farm
        self._config, self._output = str(farm.folder / "slurm.conf"), farm.folder / "output"
        self._env = farm.env(TASK_AUTHKEY=None, SLURM_CONF=self._config, PATH=f"{farm.folder}{os.pathsep}{PATH}")
        numbers = {"port": free_port(), "node_port": free_port(), "job": 1 + secrets.randbelow(9000)}
        farm.write("slurm.conf", CONFIG.format(folder=farm.folder, host=HOST, **numbers))
        farm.write("key-file", os.urandom(64)).chmod(0o600)
        files = [f"--{name}={farm.folder / name}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        farm.start(["munged", "--foreground", "--force", *files], self._env)
        farm.closing(self)
        self.wait((farm.folder / "socket").exists)
        farm.start(["slurmctld", "-D", "-i"], self._env)
        farm.start(["slurmd", "-D", "-N", HOST], self._env)
        self.wait(lambda: self.call("sinfo", "--noheader", "--format=%T") == "idle")

    def call(self, *argv: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(argv, env=self._env, cwd=self._farm.folder, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip()

    def submit(self, *options: str, module: str = MODULE) -> str:
        """Submit the script, whose function stays at task 20; returns the id of the job."""
        script, farm = find_block("slurm"), self._farm
        if not farm.tls:
            script, count = re.subn(r"--port \$port", r"\g<0> --no-tls", script)
            assert count == 2
        farm.write("farm.sh", script)
        farm.write("words.py", module)
        farm.write("python3", f'#!/bin/sh\nexec {farm.python} "$@"\n').chmod(0o755)
        farm.write_tasks(range(100))
        for name in ("task_master.py", "task_worker.py"):
            shutil.copy(ROOT / name, farm.folder)
        return self.call("sbatch", "--parsable", "--nodes=1", f"--output={self._output}", *options, "farm.sh")

    def wait_job(self, job: str, *fields: str) -> None:
        """Block until Slurm says all this of a job."""
        self.wait(lambda: {*fields} <= {*self.call("scontrol", "show", "job", job).split()})

    def wait_started(self) -> None:
        """Block until 20 tasks have a record, and the one that stays has begun."""
        self.wait(lambda: "20" in self._farm.started() and len(self._farm.records("counts.jsonl")) >= 20)

    def wait_output(self, words: str) -> None:
        self.wait(lambda: self._output.exists() and words in self._output.read_text())

    def close(self) -> None:
        """Kill what a job has left: all that works in the folder, as slurmstepd does, or has its configuration."""
        while found := [process for process in psutil.process_iter(["cwd", "environ"]) if self._owns(process)]:
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _owns(self, process: psutil.Process) -> bool:
        traces = {process.info["cwd"], (process.info["environ"] or {}).get("SLURM_CONF")}
        return is_alive(process) and not traces.isdisjoint({str(self._farm.folder), self._config})

    def wait(self, condition: Callable[[], object]) -> None:
        """Block until a condition is true; fails when one of the three ends."""
        wait_until(condition, *self._farm.programs)


def test_a_job_runs_to_its_end(any_farm: Farm) -> None:
    cluster = Cluster(any_farm)
    any_farm.let_go()
    cluster.wait_job(cluster.submit(), "JobState=COMPLETED", "ExitCode=0:0")
    any_farm.check_once(100, "counts.jsonl")


@pytest.mark.parametrize("options", [[], ["--time=1", "--signal=TERM@60"]], ids=["scancel", "time limit"])
def test_a_job_that_must_leave_drains_and_is_carried_on_from_the_queue(farm: Farm, options: list[str]) -> None:
    cluster = Cluster(farm)
    job = cluster.submit(*options)
    cluster.wait_started()
    if not options:
        cluster.call("scancel", "--signal=TERM", job)
    cluster.wait_output("task_worker: draining")
    farm.let_go()
    cluster.wait_job(job, "JobState=PENDING", "Reason=BeginTime")  # in two minutes
    assert 20 < len(farm.records("counts.jsonl")) == len(farm.started()) < 100
    cluster.call("scontrol", "update", f"job={job}", "StartTime=now")
    cluster.wait_job(job, "JobState=COMPLETED", "ExitCode=0:0", "Restarts=1")
    farm.check_once(100, "counts.jsonl")
    assert sorted(map(int, farm.started())) == [*range(100)]


def test_a_job_that_was_cancelled_is_carried_on_when_it_is_submitted_again(farm: Farm) -> None:
    cluster = Cluster(farm)
    job = cluster.submit()
    cluster.wait_started()
    cluster.call("scancel", job)
    cluster.wait_job(job, "JobState=CANCELLED")
    farm.let_go()
    cluster.wait_job(cluster.submit(), "JobState=COMPLETED", "ExitCode=0:0")
    farm.check_once(100, "counts.jsonl")
    assert [farm.started().count(str(n)) for n in range(20)] == [1] * 20


def test_a_job_ends_and_is_not_queued_again_when_all_workers_fail(farm: Farm) -> None:
    cluster = Cluster(farm)
    job = cluster.submit(module="import no_such_library")
    cluster.wait_job(job, "JobState=FAILED", "ExitCode=143:0", "Restarts=0")
    cluster.wait_output("No module named 'no_such_library'")

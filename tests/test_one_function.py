"""One function a job: nobody else's worker, no other function, no shadowed module gets into the records."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from lab import ROOT, Farm, check_one_line, check_said

from task_worker import Failure, check_spec

MODULE = """
import os, time

def old(n):
    time.sleep(0.05)
    return f"old {n}"

def new(n):
    return f"new {n}"

async def later(n):
    import asyncio
    await asyncio.sleep(0)
    if n == 2:
        raise ValueError("not two")
    return f"later {n}"

class Box:
    @staticmethod
    async def later(n):
        return f"boxed {n}"

    async def __call__(self, n):
        return f"called {n}"

call = Box()
"""


def test_a_worker_that_a_master_has_started_serves_no_other_one(farm: Farm) -> None:
    """As when its own was killed, and another one listens on that port."""
    master = farm.master("1")
    worker = farm.worker(master, env=farm.env(TASK_RUN="another"), stdin=subprocess.PIPE)
    check_said(worker, 3, "there is another master than the one that started this worker")
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)


KINDS = {"mod:new": ["--function", "mod:new"], "echo hi": ["--command", "echo hi {}"], "square|demonstration": []}
OTHERS = {"mod:old": ["--function", "mod:old"], "echo bye": ["--command", "echo bye {}"], "square|demonstration": []}
PAIRS = [("option" if KINDS[job] else "worker", job, other) for job in KINDS for other in OTHERS if job != other]


@pytest.mark.parametrize(("by", "job", "other"), [*PAIRS, ("worker", "mod:new", "mod:old"), ("worker", "echo hi", "echo bye")])
def test_a_worker_with_another_function_than_the_jobs_is_refused_naming_both(farm: Farm, by: str, job: str, other: str) -> None:
    said = KINDS[job] if by == "option" else []
    master = farm.master("--results", "results.jsonl", "--tasks", "-", *said, stdin=subprocess.PIPE)
    if by == "worker":
        worker = farm.worker(master, *KINDS[job])
        master.wait_line("worker .* connected")
    stranger = farm.worker(master, *OTHERS[other])
    if by == "worker":  # with nothing to do the stranger would stay
        stranger.wait_line(f"connected|{other}")
    else:
        check_said(stranger, 3, job, other)
        worker = farm.worker(master, *KINDS[job])
    master.give([1, 2])
    check_said(stranger, 3, job, other)
    assert (worker.wait(), master.wait()) == (0, 0)
    assert {record["worker"] for record in farm.records()} == {worker.name()}


def test_a_service_that_runs_another_function_waits_for_the_next_job(farm: Farm) -> None:
    first = farm.master("--results", "first.jsonl", "--function", "mod:old", "1")
    service = farm.worker(first, "--function", "mod:new", "--wait", 0)
    service.wait_line("mod:old.*mod:new|mod:new.*mod:old")
    assert (farm.worker(first, "--function", "mod:old").wait(), first.wait()) == (0, 0)
    second = farm.run("task_master.py", "--port", first.port(), "--results", "second.jsonl", "2")
    assert second.wait() == 0, second.stderr
    assert [farm.records(f"{name}.jsonl")[0]["result"] for name in ("first", "second")] == ["old 1", "new 2"]
    farm.run("task_master.py", "--port", first.port(), "--results", "third.jsonl", "--function", "mod:old", "3")
    service.wait_line("mod:old.*mod:new|mod:new.*mod:old", count=2)
    assert service.is_running()


@pytest.mark.parametrize("start", ["top", "function"])
def test_a_function_may_choose_how_processes_are_started(farm: Farm, start: str) -> None:
    line = "multiprocessing.set_start_method('spawn')\n"
    text = f"import multiprocessing\n{line * (start == 'top')}def run(n):\n    {line * (start != 'top')}    return n\n"
    farm.write("mod.py", text)
    farm.run_job("--function", "mod:run", "1")


@pytest.mark.parametrize("same", [True, False], ids=["the same text", "another text"])
def test_a_worker_whose_module_has_another_text_is_taken_and_said(farm: Farm, same: bool) -> None:
    folder = farm.folder / "host"
    folder.mkdir()
    farm.write("host/mod.py", MODULE + "# edited\n" * (not same))
    master = farm.master("--results", "results.jsonl", "--tasks", "-", stdin=subprocess.PIPE)
    workers = [farm.worker(master, "--function", "mod:old", cwd=cwd) for cwd in (farm.folder, folder)]
    master.wait_line("worker .* connected", count=2)
    master.give(range(40))
    assert ([worker.wait() for worker in workers], master.wait()) == ([0, 0], 0)
    said = [line for program in (master, *workers) for line in program.said(r"(?i)\bmod\b.*(text|differ|SHA)")]
    assert bool(said) != same, said
    assert len({record["worker"] for record in farm.records()}) == 2


def test_a_process_that_loads_an_edited_module_in_the_midst_of_a_job_says_so(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", "--tasks", "-", stdin=subprocess.PIPE)
    worker = farm.worker(master, "--function", "mod:old", "--tasks-per-process", 2)
    master.put("1\n2\n")
    farm.wait_records(master, 2)
    farm.write("mod.py", MODULE.replace("old {n}", "edited {n}"))
    master.give([3, 4, 5])
    assert (worker.wait(), master.wait()) == (0, 0)
    assert farm.values()[-1] == "edited 5"
    assert len(worker.said("module was edited")) == 1


SCRIPT = """
import os, sys
open(f"load-{os.getpid()}", "w").close()
if len([name for name in os.listdir() if name.startswith("load-")]) > 8:
    os._exit(99)  # so that a bug here does not fill the machine

from task_master import TaskMaster

def f(n):
    return 2 * n

with TaskMaster(port=0, workers=1, function="s6:f") as master:
    print([record.result for record in master.run([1, 2])])
"""


def test_a_script_without_a_guard_that_names_its_own_function_is_told_what_to_write(farm: Farm) -> None:
    program = farm.run(farm.write("s6.py", SCRIPT), env=farm.env(PYTHONPATH=str(ROOT)))
    assert program.wait() not in (0, 99)
    assert program.said('if __name__ == "__main__":'), program.stderr
    assert len(list(farm.folder.glob("load-*"))) <= 4  # the script, a worker's look at it, and its process


def test_a_task_may_start_a_farm_of_its_own(farm: Farm) -> None:
    use = "    with task_master.TaskMaster(port=0, workers=1) as master:\n        return next(master.run([n])).result\n"
    farm.write("outer.py", "import task_master\n\ndef f(n):\n" + use)
    farm.run_job("--function", "outer:f", "3")
    assert farm.values() == ["3 * 3 = 9"]


@pytest.mark.parametrize("safe", [{}, {"PYTHONSAFEPATH": "1"}], ids=["", "safe path"])
def test_a_module_in_a_zip_is_imported(farm: Farm, safe: dict[str, str]) -> None:
    with zipfile.ZipFile(farm.folder / "modules.zip", "w") as file:
        file.writestr("packed.py", "def triple(n):\n    return 3 * n\n")
    master = farm.run_master("5", "--workers", 1, "--function", "packed:triple", env=farm.env(PYTHONPATH="modules.zip", **safe))
    assert "Result: 15" in master.stdout


def test_a_module_that_reads_the_command_line_gets_none_of_the_workers(farm: Farm) -> None:
    farm.write("reads.py", "import sys\n\nwords = sys.argv[1:]\n\ndef f(n):\n    return words\n")
    farm.run_job(1, function="reads:f")
    assert farm.values() == [[]]


COROUTINES = {"mod:later": "later", "mod:Box.later": "boxed", "mod:call": "called"}


@pytest.mark.parametrize("spec", COROUTINES)
def test_a_coroutine_function_is_run_to_its_end(farm: Farm, spec: str) -> None:
    where = ["--results", "results.jsonl", "--workers", 1, "--function", spec]
    assert farm.master(*where, "1", "2", "3").wait() == (1 if spec == "mod:later" else 0)
    expected = [f"{COROUTINES[spec]} {n}" for n in (1, 2, 3)]
    assert farm.values() == ([expected[0], None, expected[2]] if spec == "mod:later" else expected)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("./sweep.py:vdp", r"\bsweep:vdp"),
        ("sweep.py:vdp", r"\bsweep:vdp"),
        ("{folder}/sweep.py:vdp", r"\bsweep:vdp"),
        ("lib/models/sweep.py:vdp", r"say lib\.models\.sweep:vdp"),
        ("lib/sweep:vdp", r"say lib\.sweep:vdp"),
        ("__main__:f", "__main__:f.*(file|script)"),
        *[(f"{name}:f", f"{name}:f.*standard") for name in ("token", "queue", "json", "antigravity", "test")],
    ],
)
def test_a_path_or_main_or_the_name_of_a_standard_module_is_refused_and_the_error_says_what_to_write(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, spec: str, says: str
) -> None:
    monkeypatch.chdir(farm.folder)
    farm.write(spec.partition(":")[0].rpartition("/")[2].replace(".py", "") + ".py", "def vdp(n):\n    return n\n\nf = vdp\n")
    with pytest.raises(Failure, match=f"--function.*{says}"):
        check_spec(spec.format(folder=farm.folder))


@pytest.mark.parametrize("more", [("task_master.py", "1"), ("task_worker.py", "--wait", 0.1)], ids=["master", "worker"])
def test_a_refused_function_is_one_line_before_anything_starts(farm: Farm, more: list[object]) -> None:
    check_one_line(farm.run(*more, "--port", 1, "--function", "lib/sweep:vdp"), 2, r"--function.*say lib\.sweep:vdp")


def test_the_demonstration_that_is_given_no_number_says_that_it_squares_numbers(farm: Farm) -> None:
    farm.run_job("--tasks", farm.write_tasks(["a.jpg", 3, {"to": "you"}, [1], None]), status=1)
    assert farm.values()[1] == "3 * 3 = 9"
    for record in farm.records():
        if record["task"] != 3:
            assert re.search("square.*number|number.*square", record["error"]["message"])
            assert "--function" in record["error"]["message"]


NAMES = getattr(sys, "stdlib_module_names", ["queue", "select", "token", "random", "hashlib", "shlex", "ssl", "abc"])
STANDARD = sorted(name for name in NAMES if not name.startswith("__"))
SPOILER = "open(r'{log}', 'a').write('{name} ')\nraise RuntimeError('{name} of the user instead of the standard one')\n"
USER = """
def f(n):
    import decimal, fractions, hashlib, json, subprocess, tempfile, traceback
    if n == 2:
        raise ValueError("so that a traceback is made")
    return str(decimal.Decimal(n) / 2)
"""


WHAT = {"function": ["--function", "user_module:f"], "command": ["--command", "echo {}"], "none": []}


@pytest.mark.parametrize("where", ["current folder", "beside the programs"])
@pytest.mark.parametrize("what", WHAT)
def test_no_file_of_the_user_replaces_a_standard_module(farm: Farm, where: str, what: str) -> None:
    """There are files with the names of standard modules, which complain when they are imported; some of them packages."""
    folder, log = farm.folder / "folder", farm.folder / "shadowed.log"
    folder.mkdir()
    farm.write("folder/user_module.py", USER)
    for name in STANDARD:
        path = folder / name / "__init__.py" if name.endswith("e") else folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SPOILER.format(log=log, name=name))
    program = ROOT / "task_master.py"
    if where == "beside the programs":
        for name in ("task_master.py", "task_worker.py"):
            shutil.copy(ROOT / name, folder)
        program = folder / "task_master.py"
    options = ["--results", "results.jsonl", "--timeout", 50, "--retries", 1, "--workers", 1, *WHAT[what], "1", "2", "3"]
    master = farm.run(program, "--port", 0, *options, cwd=folder)
    assert master.wait() == (1 if what == "function" else 0), master.stderr
    assert not log.exists(), log.read_text()
    assert len([1 for record in farm.records("folder/results.jsonl") if "result" in record]) == (2 if what == "function" else 3)


def test_the_reason_why_a_module_cannot_be_imported_is_said_however_long_it_is(farm: Farm) -> None:
    farm.write("long.py", "raise ImportError('the reason ' + 'x' * 20_000)\n")
    check_said(farm.master("1", "--workers", 1, "--function", "long:work"), 2, "long:work: .*the reason xxx")

"""TaskMaster checks its arguments as the command line does, runs one job at a time, and gives the port back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT

import task_master
from task_master import Failure, TaskMaster

KEY = b"a key of more than 16 bytes"
README = Path(ROOT, "README.md").read_text()
EXAMPLES = [block for block in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if "TaskMaster(" in block]
WRONG: list[tuple[str, Any]] = [
    *[("port", value) for value in (70000, -1, "5000", "http", None, 1.5, b"80")],
    *[("retries", value) for value in ("3", -1, 1.5, None)],
    *[("redeliveries", value) for value in ("2", -1, 0.5)],
    *[("timeout", value) for value in (-1, 0, "5", float("nan"), float("-inf"))],
    *[("workers", value) for value in (-1, "2", 1.5)],
    *[("max_failures", value) for value in (0, -1, "3", 2.5)],
    *[("function", value) for value in (len, "sqrt", ":sqrt", "math:", "", b"math:sqrt", "./math.py:sqrt")],
    *[("command", value) for value in (5, ["true"], 'echo "{}"', "sort | uniq")],
    *[("authkey", value) for value in ("abc", b"", b"  \n", 5)],
    *[("host", value) for value in (5, b"127.0.0.1")],
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text("import time\n\ndef f(n):\n    time.sleep(0.001)\n    return n\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("TASK_", "PYTHON"))]:
        monkeypatch.delenv(name)
    return tmp_path


def make(**options: Any) -> TaskMaster:
    return TaskMaster(**{"port": 0, "authkey": KEY, "workers": 1, "function": "mine:f", **options})


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:20] if not isinstance(value, str) else value)
def test_a_wrong_argument_is_a_failure_that_names_it(name: str, value: Any) -> None:
    options = {name: value, **({"function": None} if name == "command" else {})}
    with pytest.raises(Failure, match=f"{name}|--{name.replace('_', '-')}"), make(**options):
        pytest.fail("it started")


def test_function_and_command_are_not_for_one_job() -> None:
    with pytest.raises(Failure, match=r"function.*command|command.*function"):
        make(command="true {}")


def test_the_module_offers_three_names() -> None:
    assert sorted(task_master.__all__) == ["Failure", "Record", "TaskMaster"]


def test_run_without_start_or_after_the_end_is_a_failure() -> None:
    master = make()
    with pytest.raises(Failure, match=r"with|start"):
        next(iter(master.run([1])))
    with master:
        assert [record.result for record in master.run([1])] == [1]
    with pytest.raises(Failure):
        next(iter(master.run([1])))


def test_a_second_run_while_one_is_under_way_is_a_failure_and_the_first_goes_on() -> None:
    with make() as master:
        first = iter(master.run(range(20)))
        results = [next(first).result]
        with pytest.raises(Failure, match="run"):
            next(iter(master.run([100])))
        results += [record.result for record in first]
        assert sorted(results) == list(range(20))
        assert [record.result for record in master.run([200])] == [200]


@pytest.mark.parametrize("how", ["done", "raised", "left early", "unused"])
def test_the_port_is_free_when_the_block_ends(how: str) -> None:
    port = 0
    for _ in range(4):
        try:
            with make(port=port) as master:
                port = master.address[1]
                if how == "raised":
                    raise ZeroDivisionError
                for record in master.run(range(100)) if how != "unused" else ():
                    if how == "left early" and record.id > 2:
                        break
        except ZeroDivisionError:
            pass


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_in_readme_have_a_guard_and_pass_mypy(example: str, folder: Path) -> None:
    assert '\nif __name__ == "__main__":\n' in example
    pytest.importorskip("mypy")
    (folder / "example.py").write_text(example)
    argv = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "example.py"]
    checked = subprocess.run(argv, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr

"""Plain clients, a few lines of BaseManager: one put for each get, in order, whatever goes wrong with one of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from lab import PLAIN_CLIENT, Farm, Program


def start_client(farm: Farm, master: Program, code: str) -> Program:
    (farm.folder / "client.py").write_text(PLAIN_CLIENT + code)
    return farm.run(farm.folder / "client.py", master.port(), farm.key)


def start_master(farm: Farm, *lines: str) -> Program:
    (farm.folder / "tasks").write_text("".join(line + "\n" for line in lines))
    return farm.master("--tasks", "tasks", "--results", "results.jsonl")


def records(farm: Farm) -> dict[Any, dict[str, Any]]:
    return {str(record["task"])[:5]: record for record in farm.records()}


@pytest.mark.parametrize("depth", [100, 450, 600, 900])
def test_a_task_that_cannot_be_sent_does_not_shift_the_results_of_the_others(farm: Farm, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    master = start_master(farm, '"a"', deep, '"b"', deep, '"c"')
    code = """
for _ in range(20):
    try:
        task = tasks.get(timeout=1)
    except queue.Empty:
        break
    except Exception as error:
        print("no", type(error).__name__)
    else:
        results.put(task.upper() if isinstance(task, str) else "list")
"""
    client = start_client(farm, master, code)
    assert client.wait() in (0, 1), client.stderr  # 1: the job is over
    (farm.folder / "rest.py").write_text("def f(task):\n    return 'list'\n")  # what the client could not get is for workers
    farm.run("task_worker.py", "--port", master.port(), "--processes", 1, "--wait", 0.5, "--function", "rest:f").wait()
    assert master.wait() in (0, 1), master.stderr
    text = (farm.folder / "results.jsonl").read_text()
    assert sorted(re.findall(r'"task": "(\w)", "result": "(\w+)"', text)) == [("a", "A"), ("b", "B"), ("c", "C")]
    assert len(re.findall(r'\]+, ("result": "list"|"error": )', text)) == 2


@pytest.mark.parametrize(
    "result", ["{1, 2}", "object()", "b'x'", "1j", "{(1, 2): 3}", "__import__('decimal').Decimal(1)", "__import__('os').getcwd"]
)
def test_a_result_that_is_refused_is_an_error_of_its_task_and_is_said(farm: Farm, result: str) -> None:
    master = start_master(farm, '"a"', '"b"', '"c"')
    code = f"""
for value in ["first", {result}]:
    tasks.get()
    try:
        results.put(value)
    except Exception as error:
        print("refused", repr(error))
"""
    start_client(farm, master, code).wait()
    master.wait_line("task 1 failed|result of task 1|put.*refused|refused.*put")
    assert start_client(farm, master, "tasks.get()\nresults.put('last')\n").wait() == 0
    assert master.wait() == 1, master.stderr
    found = records(farm)
    assert [found[task].get("result") for task in "abc"] == ["first", None, "last"]
    assert found["b"]["error"]["message"]


def test_a_result_that_is_no_number_is_null(farm: Farm) -> None:
    master = start_master(farm, '"a"', '"b"')
    code = "for value in (math.nan, {'x': [1.5, -math.inf]}):\n    tasks.get()\n    results.put(value)\n"
    assert (start_client(farm, master, code).wait(), master.wait()) == (0, 0)
    assert [records(farm)[task]["result"] for task in "ab"] == [None, {"x": [1.5, None]}]


def test_a_client_may_ask_whether_there_is_something_to_do(farm: Farm) -> None:
    master = start_master(farm, "1", "2", "3")
    code = """
while not tasks.empty():
    n = tasks.get_nowait()
    assert tasks.empty() == (tasks.qsize() == 0)
    results.put(n + 1) if n < 3 else None
try:
    tasks.get_nowait()
except queue.Empty:
    print("empty")
results.put(4)
"""
    client = start_client(farm, master, code)
    assert client.wait() == 0, client.stderr
    assert (client.stdout, master.wait()) == (["empty"], 0)
    assert sorted(record["result"] for record in farm.records()) == [2, 3, 4]

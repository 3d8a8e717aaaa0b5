"""Where tasks come from: arguments, a file, standard input as it arrives; and what a line may hold."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lab import Farm, Program, check_once, check_silence, wait_until

ECHO = ("--workers", 1, "--function", "functions:same")
MORE_THAN_ALLOWED = 100_000_000  # bytes


def run_file(farm: Farm, content: bytes, *options: object, status: int = 0) -> Program:
    """Run a job whose tasks file has this content, into results.jsonl, to its end."""
    master = farm.master("--tasks", farm.write("tasks.jsonl", content), "--results", "results.jsonl", *options)
    assert master.wait() == status, master.stderr
    return master


def echoed(farm: Farm) -> list[Any]:
    """The tasks of the records, checked to have the ids 0, 1, 2... and their own value as their result."""
    records = sorted(farm.records(), key=lambda record: record["id"])
    check_once(records, len(records))
    assert all(record["result"] == record["task"] for record in records)
    return [record["task"] for record in records]


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments", "tasks"),
    [
        (["--"], ["1", '"two"', '{"three": [3, null]}', "4.5", "-6", '"1"'], [1, "two", {"three": [3, None]}, 4.5, -6, "1"]),
        ([], ['{"a":\r\n [1,\n2]}', "3"], [{"a": [1, 2]}, 3]),
        (["--text"], ["1", "{x", "two words"], ["1", "{x", "two words"]),
    ],
    ids=["JSON", "JSON on several lines", "text"],
)
def test_arguments_are_json_values_or_strings(farm: Farm, options: list[str], arguments: list[str], tasks: list[Any]) -> None:
    farm.run_job(*options, *arguments, function="functions:same")
    assert echoed(farm) == tasks
    assert len((farm.folder / "results.jsonl").read_bytes().splitlines()) == len(tasks)


def test_without_results_file_values_are_shown_as_in_the_tutorial(farm: Farm) -> None:
    master = farm.master(*ECHO, '"a string"', '{"b": [1, null]}')
    assert master.wait() == 0
    puts = ["Put task a string...", 'Put task {"b": [1, null]}...', "Try get results..."]
    assert master.stdout == [*puts, "Result: a string", 'Result: {"b": [1, null]}']


def test_without_tasks_there_are_ten_random_integers(farm: Farm) -> None:
    master = farm.master()
    master.wait_line("^Try get results...$", "stdout")
    numbers = [int(line.split()[2].rstrip(".")) for line in master.stdout[:-1]]
    assert len(numbers) == 10
    assert all(0 <= number <= 10000 for number in numbers)


@pytest.mark.parametrize("argument", ["{bad", "NaN", "1 2", ""])
def test_an_argument_that_is_not_json_is_refused_before_anything_starts(farm: Farm, argument: str) -> None:
    master = farm.master("1", argument, "3")
    assert master.wait() == 2
    (line,) = master.stderr
    assert line.startswith("task_master: ") and argument in line
    assert master.stdout == []


# ---- a file --------------------------------------------------------------------------------------------------------

VALUES = ["a", {"b": 1}, [], 0, None, False, 12345678901234567890123, "a"]


@pytest.mark.parametrize(
    ("content", "tasks"),
    [
        ("".join(json.dumps(value) + "\n" for value in VALUES).encode(), VALUES),
        (b"\n1\n\n   \n\t\n2\r\n\r\n3\n\n", [1, 2, 3]),
        (b'"one"\n2\n{"three": 3}', ["one", 2, {"three": 3}]),
        (b'"one"\r\n2\r\n{"three": 3}', ["one", 2, {"three": 3}]),
        (b'"one"\r\n2\r\n{"three": 3}\r\n', ["one", 2, {"three": 3}]),
        (b'  1 \n\t"two"\t\r\n', [1, "two"]),
    ],
    ids=["a value a line", "blank lines", "LF", "CRLF", "CRLF at the end", "space around"],
)
def test_a_file_has_one_json_value_a_line(farm: Farm, content: bytes, tasks: list[Any]) -> None:
    run_file(farm, content, *ECHO)
    assert echoed(farm) == tasks


def test_with_text_a_line_is_a_string_whatever_it_holds(farm: Farm) -> None:
    run_file(farm, b'1\n{bad\n"quoted"\n two  words \n\nNaN\nback\\slash\r\nlast', "--text", *ECHO)
    assert echoed(farm) == ["1", "{bad", '"quoted"', " two  words ", "NaN", "back\\slash", "last"]


def test_every_letter_arrives_as_it_was(farm: Farm) -> None:
    text = 'ü 漢字 \U0001f600 \u2028 \x85 \\ " \x00 \n'
    run_file(farm, (json.dumps(text, ensure_ascii=False) + "\n" + json.dumps(text) + "\n").encode(), *ECHO)
    lines = (farm.folder / "results.jsonl").read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line)["result"] for line in lines] == [text, text]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_records_on_standard_output_are_utf_8_whatever_the_terminal_is(farm: Farm, encoding: str) -> None:
    master = farm.master(*ECHO, "--results", "-", '"é 漢"', env=farm.env(PYTHONIOENCODING=encoding))
    assert master.wait() == 0
    assert [json.loads(line)["result"] for line in master.stdout] == ["é 漢"]


def test_letters_that_the_terminal_does_not_have_cost_no_task(farm: Farm) -> None:
    master = farm.master(*ECHO, '"é"', "2", env=farm.env(PYTHONIOENCODING="ascii"))
    assert master.wait() == 0
    assert [sum(line.startswith(start) for line in master.stdout) for start in ("Put task ", "Result: ")] == [2, 2]


@pytest.mark.parametrize("workers", [[], ["--workers", "1"]], ids=["no worker", "a local worker"])
def test_an_empty_file_is_a_job_without_tasks(farm: Farm, workers: list[str]) -> None:
    master = run_file(farm, b"\n\n", *workers)
    assert farm.records() == []
    assert not master.said("cannot reach")


@pytest.mark.parametrize("results", [[], ["--results", "-"], ["--results", "results.jsonl"]], ids=["shown", "-", "FILE"])
def test_file_names_that_are_not_utf_8_can_be_opened_by_the_function(farm: Farm, results: list[str]) -> None:
    names = [b"caf\xe9.txt", "café.txt".encode()]
    try:
        for size, name in enumerate(names):
            Path(os.fsdecode(farm.folder), os.fsdecode(name)).write_bytes(b"x" * size)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    farm.write("names", b"\n".join(names))
    options = ["--text", "--tasks", "names", "--workers", "1", "--function", "os.path:getsize", *results]
    master = farm.master(*options, env=farm.env(PYTHONIOENCODING="utf-8:strict"))
    assert master.wait() == 0, master.stderr
    if not results:
        assert sorted(line for line in master.stdout if line.startswith("Result:")) == ["Result: 0", "Result: 1"]
        return
    records = list(map(json.loads, master.stdout)) if results[1] == "-" else farm.records()
    assert {os.fsencode(record["task"]): record["result"] for record in records} == {names[0]: 0, names[1]: 1}


# ---- standard input, as it arrives ---------------------------------------------------------------------------------


@pytest.fixture
def fed(farm: Farm) -> Program:
    """A master with a local worker whose standard input is a pipe."""
    return farm.master("--tasks", "-", "--results", "-", *ECHO, stdin=subprocess.PIPE)


def test_each_task_on_standard_input_is_run_and_recorded_before_the_next_is_written(fed: Program) -> None:
    for number in range(5):
        fed.put(f'"task {number}"\n')
        line = fed.wait_line(f'"id": {number},', "stdout").string
        assert json.loads(line)["result"] == f"task {number}"
        assert fed.is_running()
    fed.end_input()
    assert fed.wait() == 0
    assert len(fed.stdout) == 5


@pytest.mark.skipif(not shutil.which("tail"), reason="there is no tail here")
def test_tail_follows_a_file_as_a_queue(farm: Farm) -> None:
    queue, results = farm.write("queue.jsonl", "0\n"), farm.folder / "results.jsonl"
    with subprocess.Popen(["tail", "-n", "+1", "-f", str(queue)], stdout=subprocess.PIPE) as tail:
        try:
            master = farm.master("--tasks", "-", "--results", results, *ECHO, stdin=tail.stdout)
            for number in range(4):
                wait_until(lambda number=number: results.exists() and len(farm.records()) > number, master)
                with queue.open("a") as file:
                    file.write(f"{number + 1}\n")
            assert master.is_running()
        finally:
            tail.kill()
    assert master.wait() == 0
    assert echoed(farm)[:4] == [0, 1, 2, 3]


def test_a_line_that_arrives_in_pieces_is_one_task(fed: Program) -> None:
    fed.put("1\n2")
    fed.wait_line('"id": 0,', "stdout")  # so the piece behind it has been read
    fed.put("3\n")
    assert json.loads(fed.wait_line('"id": 1,', "stdout").string)["result"] == 23
    fed.end_input()
    assert fed.wait() == 0


def test_a_master_that_waits_for_standard_input_leaves_when_it_is_told_to(fed: Program) -> None:
    fed.put("1\n")
    fed.wait_line('"id": 0,', "stdout")
    fed.signal(signal.SIGTERM)
    assert fed.wait() == 143


# ---- large tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JSON", "text", "number"])
def test_a_task_of_100_megabytes_fails_with_its_line_and_a_remedy_and_the_job_goes_on(farm: Farm, kind: str) -> None:
    start, end = (b"1\n1.", b"\n3\n") if kind == "number" else (b'1\n"', b'"\n3\n')
    with (farm.folder / "tasks.jsonl").open("wb") as file:
        file.write(start)
        if kind == "number":
            file.write(b"1" * MORE_THAN_ALLOWED)
        else:
            file.seek(MORE_THAN_ALLOWED, os.SEEK_CUR)  # zeros, without writing them
        file.write(end)
    options = ("--tasks", "tasks.jsonl", *["--text"] * (kind == "text"))
    master = farm.run_job(*options, function="functions:same", status=1)
    first, failed, last = sorted(farm.records(), key=lambda record: record["id"])
    assert [first["result"], last["result"]] == (["1", "3"] if kind == "text" else [1, 3])
    told, _counted = master.said("tasks.jsonl, line 2: .*put a path there")
    assert failed["error"]["message"] in told
    check_silence(master)


def test_a_task_of_20_megabytes_is_run(farm: Farm) -> None:
    run_file(farm, b'"1"\n"' + b"x" * 20_000_000 + b'"\n', "--workers", "1", "--function", "builtins:len")
    assert sorted(record["result"] for record in farm.records()) == [1, 20_000_000]

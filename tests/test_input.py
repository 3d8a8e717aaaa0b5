"""Where tasks come from: arguments, a file, standard input as it arrives; and what a line may hold."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from conftest import PATIENCE, Farm, Program

ECHO = """
import os

def echo(task):
    return task

def count(task):
    return len(task)

def size(path):
    return os.path.getsize(path)
"""
MORE_THAN_ALLOWED = 100_000_000  # bytes


@pytest.fixture
def echo(farm: Farm) -> list[str]:
    """Options for a local worker that returns each task as it is."""
    (farm.folder / "echo.py").write_text(ECHO)
    return ["--workers", "1", "--function", "echo:echo"]


def run_file(farm: Farm, content: bytes, *argv: str, **options: Any) -> Program:
    """Run a job whose tasks file has this content, into results.jsonl, to its end."""
    (farm.folder / "tasks.jsonl").write_bytes(content)
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", *argv, **options)
    master.wait()
    return master


def tasks_by_id(farm: Farm) -> list[Any]:
    """The tasks of the records, checked to have the ids 0, 1, 2... and their own value as their result."""
    records = sorted(farm.records(), key=lambda record: record["id"])
    assert [record["id"] for record in records] == list(range(len(records)))
    assert all(record["result"] == record["task"] for record in records)
    return [record["task"] for record in records]


@pytest.fixture
def fed(farm: Farm, echo: list[str]) -> Iterator[tuple[Program, BinaryIO]]:
    """A master with a local worker whose standard input is a pipe, and the other end of it."""
    master = farm.master("--tasks", "-", "--results", "-", *echo, stdin=subprocess.PIPE, bufsize=0)
    assert master.process.stdin
    with master.process.stdin as pipe:
        yield master, pipe  # type: ignore[misc]


def check_refused(master: Program, *words: str) -> None:
    """Exit status 2, and one line that says all of `words`."""
    assert master.wait() == 2
    lines = [line for line in master.stderr if all(word.lower() in line.lower() for word in words)]
    assert len(lines) == 1, master.stderr
    assert "Traceback" not in "\n".join(master.stderr)


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_are_json_values(farm: Farm, echo: list[str]) -> None:
    values = [1, "two", {"three": [3, None, True]}, 4.5, -6, "1"]
    master = farm.master(*echo, "--results", "results.jsonl", "--", *map(json.dumps, values))
    assert master.wait() == 0
    assert tasks_by_id(farm) == values


def test_an_argument_that_is_json_on_two_lines_is_one_task(farm: Farm, echo: list[str]) -> None:
    master = farm.master(*echo, "--results", "results.jsonl", '{"a":\r\n [1,\n2]}', "3")
    assert master.wait() == 0
    assert tasks_by_id(farm) == [{"a": [1, 2]}, 3]
    assert len((farm.folder / "results.jsonl").read_bytes().splitlines()) == 2


def test_with_text_arguments_are_strings(farm: Farm, echo: list[str]) -> None:
    master = farm.master(*echo, "--results", "results.jsonl", "--text", "1", "{x", "two words")
    assert master.wait() == 0
    assert tasks_by_id(farm) == ["1", "{x", "two words"]


def test_without_results_file_values_are_shown_as_in_the_tutorial(farm: Farm, echo: list[str]) -> None:
    master = farm.master(*echo, "--batch", 1, '"a string"', '{"b": [1, null]}')
    assert master.wait() == 0
    puts = ["Put task a string...", 'Put task {"b": [1, null]}...', "Try get results..."]
    assert master.stdout == [*puts, "Result: a string", 'Result: {"b": [1, null]}']


def test_without_tasks_there_are_ten_random_integers(farm: Farm) -> None:
    master = farm.master()
    master.wait_line("^Try get results...$", "stdout")
    numbers = [int(line.split()[2].rstrip(".")) for line in master.stdout[:-1]]
    assert len(numbers) == 10
    assert all(0 <= number <= 10000 for number in numbers)


# ---- a file --------------------------------------------------------------------------------------------------------


def test_a_file_has_one_json_value_a_line(farm: Farm, echo: list[str]) -> None:
    values = ["a", {"b": 1}, [], 0, None, False, 12345678901234567890123, "a"]
    assert run_file(farm, "".join(json.dumps(value) + "\n" for value in values).encode(), *echo).wait() == 0
    assert tasks_by_id(farm) == values


def test_blank_lines_are_skipped_and_take_no_id(farm: Farm, echo: list[str]) -> None:
    assert run_file(farm, b"\n1\n\n   \n\t\n2\r\n\r\n3\n\n", *echo).wait() == 0
    assert tasks_by_id(farm) == [1, 2, 3]


@pytest.mark.parametrize(
    ("end", "last"), [(b"\n", b""), (b"\r\n", b""), (b"\r\n", b"\r\n")], ids=["LF", "CRLF", "CRLF at the end"]
)
def test_lines_end_as_on_unix_or_windows_and_the_last_may_not_end(farm: Farm, echo: list[str], end: bytes, last: bytes) -> None:
    content = end.join([b'"one"', b"2", b'{"three": 3}']) + last
    assert run_file(farm, content, *echo).wait() == 0
    assert tasks_by_id(farm) == ["one", 2, {"three": 3}]


def test_space_around_a_value_does_not_matter(farm: Farm, echo: list[str]) -> None:
    assert run_file(farm, b'  1 \n\t"two"\t\r\n', *echo).wait() == 0
    assert tasks_by_id(farm) == [1, "two"]


def test_every_letter_arrives_as_it_was(farm: Farm, echo: list[str]) -> None:
    text = 'ü 漢字 \U0001f600 \u2028 \x85 \\ " \x00 \n'
    content = json.dumps(text, ensure_ascii=False) + "\n" + json.dumps(text) + "\n"
    assert run_file(farm, content.encode(), *echo).wait() == 0
    lines = (farm.folder / "results.jsonl").read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line)["result"] for line in lines] == [text, text]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_records_on_standard_output_are_utf_8_whatever_the_terminal_is(farm: Farm, echo: list[str], encoding: str) -> None:
    master = farm.master(*echo, "--results", "-", '"é 漢"', env=farm.env(PYTHONIOENCODING=encoding))
    assert master.wait() == 0
    assert [json.loads(line)["result"] for line in master.stdout] == ["é 漢"]


def test_letters_that_the_terminal_does_not_have_cost_no_task(farm: Farm, echo: list[str]) -> None:
    master = farm.master(*echo, '"é"', "2", env=farm.env(PYTHONIOENCODING="ascii"))
    assert master.wait() == 0
    assert len([line for line in master.stdout if line.startswith("Put task ")]) == 2
    assert len([line for line in master.stdout if line.startswith("Result: ")]) == 2


@pytest.mark.parametrize("workers", [[], ["--workers", "1"]], ids=["no worker", "a local worker"])
def test_an_empty_file_is_a_job_without_tasks(farm: Farm, workers: list[str]) -> None:
    master = run_file(farm, b"\n\n", *workers)
    assert master.wait() == 0
    assert farm.records() == []
    assert not [line for line in master.stderr if "cannot reach" in line]


# ---- text ----------------------------------------------------------------------------------------------------------


def test_with_text_a_line_is_a_string_whatever_it_holds(farm: Farm, echo: list[str]) -> None:
    content = b'1\n{bad\n"quoted"\n two  words \n\nNaN\nback\\slash\r\nlast'
    assert run_file(farm, content, "--text", *echo).wait() == 0
    assert tasks_by_id(farm) == ["1", "{bad", '"quoted"', " two  words ", "NaN", "back\\slash", "last"]


@pytest.mark.parametrize("results", [[], ["--results", "-"], ["--results", "results.jsonl"]], ids=["shown", "-", "FILE"])
def test_file_names_that_are_not_utf_8_can_be_opened_by_the_function(farm: Farm, echo: list[str], results: list[str]) -> None:
    names = [b"caf\xe9.txt", "café.txt".encode()]
    try:
        for size, name in enumerate(names):
            Path(os.fsdecode(farm.folder), os.fsdecode(name)).write_bytes(b"x" * size)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    (farm.folder / "names").write_bytes(b"\n".join(names))
    options = ["--text", "--tasks", "names", "--workers", "1", "--function", "echo:size", *results]
    master = farm.master(*options, env=farm.env(PYTHONIOENCODING="utf-8:strict"))
    assert master.wait() == 0, master.stderr
    if not results:
        assert sorted(line for line in master.stdout if line.startswith("Result:")) == ["Result: 0", "Result: 1"]
        return
    records = list(map(json.loads, master.stdout)) if results[1] == "-" else farm.records()
    assert {os.fsencode(record["task"]): record["result"] for record in records} == {names[0]: 0, names[1]: 1}


# ---- standard input, as it arrives ---------------------------------------------------------------------------------


def test_each_task_on_standard_input_is_run_and_recorded_before_the_next_is_written(fed: tuple[Program, BinaryIO]) -> None:
    master, pipe = fed
    for number in range(5):
        pipe.write(b'"task %d"\n' % number)
        line = master.wait_line(f'"id": {number},', "stdout").string
        assert json.loads(line)["result"] == f"task {number}"
        assert master.process.poll() is None
    assert len(master.stdout) == 5
    pipe.close()
    assert master.wait() == 0


@pytest.mark.skipif(not shutil.which("tail"), reason="there is no tail here")
def test_tail_follows_a_file_as_a_queue(farm: Farm, echo: list[str]) -> None:
    queue, results = farm.folder / "queue.jsonl", farm.folder / "results.jsonl"
    queue.write_text("0\n")
    tail = subprocess.Popen(["tail", "-n", "+1", "-f", str(queue)], stdout=subprocess.PIPE)
    try:
        master = farm.master("--tasks", "-", "--results", results, *echo, stdin=tail.stdout)
        for number in range(1, 4):
            wait_for_records(results, number)
            with queue.open("a") as file:
                file.write(f"{number}\n")
        wait_for_records(results, 4)
        assert master.process.poll() is None
    finally:
        tail.kill()
        tail.wait()
        assert tail.stdout
        tail.stdout.close()
    assert master.wait() == 0
    assert tasks_by_id(farm) == [0, 1, 2, 3]


def wait_for_records(path: Path, count: int) -> None:
    give_up_at = time.monotonic() + PATIENCE
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < give_up_at, f"{path} has fewer than {count} records"
        time.sleep(0.01)


def test_a_line_that_arrives_in_pieces_is_one_task(fed: tuple[Program, BinaryIO]) -> None:
    master, pipe = fed
    pipe.write(b"1\n2")
    master.wait_line('"id": 0,', "stdout")  # so the piece behind it has been read
    pipe.write(b"3\n")
    assert json.loads(master.wait_line('"id": 1,', "stdout").string)["result"] == 23
    pipe.close()
    assert master.wait() == 0


def test_a_bad_line_on_standard_input_ends_the_job_although_the_pipe_stays_open(fed: tuple[Program, BinaryIO]) -> None:
    master, pipe = fed
    pipe.write(b"1\n\n{bad\n")
    check_refused(master, "standard input", "line 3")
    assert [json.loads(line)["task"] for line in master.stdout] == [1]


def test_a_master_that_waits_for_standard_input_leaves_when_it_is_told_to(fed: tuple[Program, BinaryIO]) -> None:
    master, pipe = fed
    pipe.write(b"1\n")
    master.wait_line('"id": 0,', "stdout")
    master.signal(signal.SIGTERM)
    assert master.wait() == 143


# ---- bad lines -----------------------------------------------------------------------------------------------------


def test_bad_json_at_line_3_ends_the_input_after_the_two_tasks_before_it(farm: Farm, echo: list[str]) -> None:
    master = run_file(farm, b"1\n2\n{bad\n4\n", *echo)
    check_refused(master, "tasks.jsonl", "line 3")
    assert tasks_by_id(farm) == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        b"NaN",
        b"[1, Infinity]",
        b'{"a": -Infinity}',
        b"1 2",
        b"'one'",
        b'"open',
        b'"\xff"',
        b"{a: 1}",
        b"[1,]",
        b'"\t"',
        b"[" * 200_000,
    ],
    ids="NaN,Infinity,-Infinity,two values,single quotes,open string,not UTF-8,bare key,comma,control,nesting".split(","),
)
def test_a_line_that_is_not_strict_json_is_refused(farm: Farm, line: bytes) -> None:
    master = run_file(farm, b"\n" + line + b"\n")
    check_refused(master, "tasks.jsonl", "line 2")
    assert farm.records() == []


def test_a_byte_order_mark_is_named(farm: Farm) -> None:
    check_refused(run_file(farm, b"\xef\xbb\xbf1\n2\n"), "tasks.jsonl", "line 1", "BOM")


@pytest.mark.parametrize("argument", ["{bad", "NaN", "1 2", ""])
def test_an_argument_that_is_not_json_is_refused_before_anything_starts(farm: Farm, argument: str) -> None:
    master = farm.master("1", argument, "3")
    check_refused(master, "task_master:", argument)
    assert master.stdout == []
    assert len(master.stderr) == 1


# ---- large tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [[], ["--text"]], ids=["JSON", "text"])
def test_a_task_of_100_megabytes_is_refused_with_its_line_and_a_remedy(farm: Farm, text: list[str], echo: list[str]) -> None:
    path = farm.folder / "tasks.jsonl"
    with path.open("wb") as file:
        file.write(b'1\n"')
        file.seek(MORE_THAN_ALLOWED, os.SEEK_CUR)  # zeros, without writing them
        file.write(b'"\n3\n')
    master = farm.master("--tasks", path, "--results", "results.jsonl", *echo, *text)
    check_refused(master, "tasks.jsonl", "line 2", "put a path there")
    assert len(farm.records()) == 1


def test_a_number_of_100_megabytes_is_refused_whole(farm: Farm) -> None:
    path = farm.folder / "tasks.jsonl"
    path.write_bytes(b"1\n1." + b"1" * MORE_THAN_ALLOWED + b"\n3\n")
    master = farm.master("--tasks", path, "--results", "results.jsonl", "--workers", 1)
    check_refused(master, "tasks.jsonl", "line 2", "put a path there")
    assert [record["task"] for record in farm.records()] == [1]


def test_a_task_of_20_megabytes_is_run(farm: Farm, echo: list[str]) -> None:
    size = 20_000_000
    options = ["--workers", "1", "--function", "echo:count"]
    assert run_file(farm, b'1\n"' + b"x" * size + b'"\n', *options).wait() == 1  # an integer has no length
    results = [record.get("result") for record in sorted(farm.records(), key=lambda record: record["id"])]
    assert results == [None, size]

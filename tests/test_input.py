"""Where tasks come from: arguments, a file, standard input as it arrives; what a line may hold, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Farm, Program, check_once, check_one_line, check_said, check_silence

from task_master import Failure, check_options, make_parser, open_input

ECHO = ("--workers", 1, "--function", "functions:same")
MORE_THAN_ALLOWED = 100_000_000  # bytes
BOM = b"\xef\xbb\xbf"


def run_input(farm: Farm, content: bytes, *options: object, stream: bool = False, status: int = 0) -> Program:
    """Run a job with this tasks file, or stream, to its end; the function returns the task."""
    options = ("--tasks", "-" if stream else "tasks", *options)
    with farm.write("tasks", content).open("rb") as stdin:
        return farm.run_job(*options, function="functions:same", status=status, stdin=stdin)


def read(folder: Path, content: bytes, *options: str) -> list[list[str]]:
    """The tasks in a file, as JSON texts in batches. Raises Failure."""
    path = folder / "tasks"
    path.write_bytes(content)
    return [batch for batch in open_batches(path, *options) if batch]


def open_batches(path: Path, *options: str) -> Iterator[list[str]]:
    parser = make_parser()
    parsed = parser.parse_args(["--tasks", str(path), *options])
    check_options(parser, parsed)
    return open_input(parsed)


def echoed(farm: Farm) -> list[Any]:
    """The tasks of the records, checked to have the ids 0, 1, 2... and their own value as their result."""
    records = farm.in_order()
    check_once(records, len(records))
    assert all(record["result"] == record["task"] for record in records)
    return [record["task"] for record in records]


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


@pytest.mark.parametrize("lines", [100, 100_000, 300_000])
def test_a_file_that_is_overwritten_while_it_is_read_gives_no_task_of_two_halves(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "tasks"
    path.write_text("".join(f"list one, {number}\n" for number in range(200_000)))
    batches = open_batches(path, "--text")
    read = next(batches)
    path.write_text("".join(f"another list, {number}\n" for number in range(lines)))
    with pytest.raises(Failure, match="tasks was overwritten"):
        read += [text for batch in batches for text in batch]
    assert read == [f'"list one, {number}"' for number in range(len(read))]


def test_a_file_that_grows_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "tasks"
    path.write_text("1\n" * 200_000)
    batches = open_batches(path)
    count = len(next(batches))
    with path.open("a") as file:
        file.write("1\n" * 100)
    assert count + sum(map(len, batches)) == 200_100


def test_a_second_tasks_file_is_refused_instead_of_the_first_being_dropped(farm: Farm) -> None:
    check_one_line(farm.master("--tasks", "one", "--tasks", "two"), 2, "--tasks takes one FILE: .*cat")


@pytest.mark.parametrize("number", ["-1e5", "-1E-5", "-5", "-0.5"])
def test_a_negative_number_is_a_task_or_the_error_says_how(farm: Farm, number: str) -> None:
    master = farm.master("--workers", 1, "--results", "results.jsonl", number)
    if master.wait() == 2:
        check_said(master, 2, r"(^|[ `'(])--[ `'),]")
        farm.run_job("--", number)
    assert [record["task"] for record in farm.records()] == [json.loads(number)]


def test_without_results_file_values_are_shown_as_in_the_tutorial(farm: Farm) -> None:
    master = farm.run_master(*ECHO, '"a string"', '{"b": [1, null]}')
    puts = ["Put task a string...", 'Put task {"b": [1, null]}...', "Try get results..."]
    assert master.stdout == [*puts, "Result: a string", 'Result: {"b": [1, null]}']


@pytest.mark.parametrize("argument", ["{bad", "NaN", "1 2", ""])
def test_an_argument_that_is_not_json_is_refused_before_anything_starts(farm: Farm, argument: str) -> None:
    master = farm.master("1", argument, "3")
    check_one_line(master, 2, re.escape(argument))
    assert master.stdout == []


VALUES = ["a", {"b": 1}, [], 0, None, False, 12345678901234567890123, "a"]
THREE = ["one", 2, {"three": 3}]
NAMES = ["two\nlines", " a b ", "-n", '{"a": 1}', "1", "\r", "ü", os.fsdecode(b"\xff"), "last"]
WORDS = ["1", "{bad", '"quoted"', " two  words ", "NaN", "back\\slash", "last"]
ZEROS = b"\0".join(map(os.fsencode, NAMES[:-1])) + b"\0\0\0last"


@pytest.mark.parametrize(
    ("option", "content", "tasks"),
    [
        pytest.param("", "".join(json.dumps(value) + "\n" for value in VALUES).encode(), VALUES, id="a value a line"),
        pytest.param("", b"\n1\n\n   \n\t\n2\r\n\r\n3\n\n", [1, 2, 3], id="blank lines"),
        pytest.param("", b'"one"\n2\n{"three": 3}', THREE, id="LF"),
        pytest.param("", b'"one"\r\n2\r\n{"three": 3}', THREE, id="CRLF"),
        pytest.param("", b'"one"\r\n2\r\n{"three": 3}\r\n', THREE, id="CRLF at the end"),
        pytest.param("", b'  1 \n\t"two"\t\r\n', [1, "two"], id="space around"),
        pytest.param("--text", "\n".join([*WORDS[:4], "", *WORDS[4:6]]).encode() + b"\r\nlast", WORDS, id="text"),
        pytest.param("-0", ZEROS, NAMES, id="zero bytes"),
        pytest.param("--null", ZEROS, NAMES, id="the long name of -0"),
        pytest.param("", BOM + b"1\r\n2\n", [1, 2], id="BOM"),
        pytest.param("", BOM, [], id="nothing but a BOM"),
        pytest.param("", BOM + b"\n\n1\n", [1], id="BOM and blank lines"),
        pytest.param("--text", BOM + b"a\nb\n", ["a", "b"], id="BOM and text"),
        pytest.param("-0", BOM + b"a\0b", ["a", "b"], id="BOM and zero bytes"),
        pytest.param("--text", b"a\n" + BOM + b"b", ["a", "\ufeffb"], id="BOM later"),
    ],
)
def test_each_line_is_a_task(tmp_path: Path, option: str, content: bytes, tasks: list[Any]) -> None:
    assert [json.loads(text) for batch in read(tmp_path, content, *option.split()) for text in batch] == tasks


@pytest.mark.parametrize("task", ["[1,\r2]", '{"a":\r{"b":\r\r1}}\r', '"a\\rb"'], ids=["list", "object", "escaped"])
@pytest.mark.parametrize("given", ["file", "argument", "text"])
def test_a_record_is_one_line_for_a_reader_with_universal_newlines(farm: Farm, task: str, given: str) -> None:
    if given == "argument":
        farm.run_job("1", task, "3", function="functions:same")
    else:
        run_input(farm, f"1\n{task}\n3\n".encode(), *["--text"] * (given == "text"))
    assert b"\r" not in (farm.folder / "results.jsonl").read_bytes()
    assert len((farm.folder / "results.jsonl").read_text().splitlines()) == 3  # which splits at a bare CR
    assert echoed(farm)[1] == (task.rstrip("\r") if given == "text" else json.loads(task))


def test_every_letter_arrives_as_it_was(farm: Farm) -> None:
    text = 'ü 漢字 \U0001f600 \u2028 \x85 \\ " \x00 \n'
    run_input(farm, (json.dumps(text, ensure_ascii=False) + "\n" + json.dumps(text) + "\n").encode())
    lines = (farm.folder / "results.jsonl").read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line)["result"] for line in lines] == [text, text]


def test_letters_that_the_terminal_does_not_have_cost_no_task_and_records_are_utf_8(farm: Farm) -> None:
    env = farm.env(PYTHONIOENCODING="ascii")
    master = farm.run_master(*ECHO, "--results", "-", '"é 漢"', env=env)
    assert [json.loads(line)["result"] for line in master.stdout] == ["é 漢"]
    master = farm.run_master(*ECHO, '"é"', "2", env=env)
    assert [sum(line.startswith(start) for line in master.stdout) for start in ("Put task ", "Result: ")] == [2, 2]


@pytest.mark.parametrize("workers", [[], ["--workers", "1"]], ids=["no worker", "a local worker"])
def test_an_empty_file_is_a_job_without_tasks(farm: Farm, workers: list[str]) -> None:
    master = farm.master("--tasks", farm.write("tasks", "\n\n"), "--results", "results.jsonl", *workers)
    assert (master.wait(), farm.records(), master.said("cannot reach")) == (0, [], [])


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
    master = farm.run_master(*options, env=farm.env(PYTHONIOENCODING="utf-8:strict"))
    if not results:
        assert sorted(line for line in master.stdout if line.startswith("Result:")) == ["Result: 0", "Result: 1"]
        return
    records = list(map(json.loads, master.stdout)) if results[1] == "-" else farm.records()
    assert {os.fsencode(record["task"]): record["result"] for record in records} == {names[0]: 0, names[1]: 1}


BAD = [b"{bad", b"NaN", b"[1, Infinity]", b"1 2", b"'one'", b'"\xff"', b"1,", b"[" * 100_000, b"1\x002", b'"a\rb"']


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("options", [[], ["--text"]], ids=["JSON", "text"])
def test_utf_16_is_refused_by_name_and_so_are_zero_bytes(tmp_path: Path, encoding: str, options: list[str]) -> None:
    with pytest.raises(Failure, match=r"UTF-16.* -0"):
        read(tmp_path, "1\n2\n".encode(encoding), *options)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad[:15]))
def test_a_first_line_that_is_bad_means_another_format(tmp_path: Path, bad: bytes) -> None:
    with pytest.raises(Failure, match=r"tasks, line 2: |UTF-16"):
        read(tmp_path, b"\n" + bad + b"\n1\n2\n")


@pytest.mark.parametrize("bad", [BAD[0], "1\n".encode("utf-16")], ids=["JSON", "UTF-16"])
@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_where_the_format_is_another_one_line_says_so_and_nothing_is_done(farm: Farm, bad: bytes, stream: bool) -> None:
    master = run_input(farm, b"\n" + bad + b"\n1\n2\n", stream=stream, status=2)
    check_said(master, 2, "standard input" if stream else "tasks", "line 2|utf-16")
    assert not farm.results.exists()


def test_lines_that_are_bad_are_tasks_that_failed_and_the_job_goes_on_without_waiting(farm: Farm) -> None:
    bad = [*BAD, *[b"bad"] * 1000, b"{without an end"]
    master = run_input(farm, b"\n".join([b"1", *bad[:-1], b"3", bad[-1]]), "--retries", 2, stream=True, status=1)
    first, *failed, good, last = farm.in_order()
    assert (first["result"], good["result"], len(failed)) == (1, 3, len(bad) - 1)
    for record, line in zip([*failed, last], bad):
        assert os.fsencode(record["task"]) == line
        assert record["error"]["type"] and record["error"]["message"]
    assert master.said("task 1|line 2")
    check_silence(master)


def test_a_task_argument_is_text_with_null_and_must_be_utf_8_without_it(farm: Farm) -> None:
    for options in (["-0"], ["--text"]):
        master = farm.run_master(*options, "--workers", 1, "--function", "functions:same", "--", "\udce9", "5")
        assert master.stdout[-1] == "Result: 5"
    check_said(farm.master("--workers", 1, "--", '"\udce9"'), 2, "TASK.*UTF-8 .*--text")


def test_a_job_with_a_bad_line_is_resumed(farm: Farm) -> None:
    for options in ([], ["--resume"]):
        run_input(farm, b"1\n{bad\n3\n", *options, status=1)
        assert ["error" in record for record in farm.in_order()] == [False, True, False]
    run_input(farm, b"1\n2\n3\n", "--resume")  # it was mended
    assert [record["task"] for record in farm.in_order()] == [1, 2, 3]


def test_a_line_that_has_become_bad_since_it_has_a_result_spoils_no_record(farm: Farm) -> None:
    for content, options in ((b'1\n"x"\n', []), (b"1\nx\n", ["--resume"])):
        run_input(farm, content, *options)
        assert [record["task"] for record in farm.in_order()] == [1, "x"]


def test_each_task_on_standard_input_is_recorded_before_the_next_is_written_though_one_is_bad_or_in_pieces(farm: Farm) -> None:
    master = farm.master("--tasks", "-", "--results", "-", *ECHO, stdin=subprocess.PIPE)
    for number, text in enumerate(['"a"\n', "2\n", "{bad\n4", "5\n"]):
        master.put(text)
        record = json.loads(master.wait_line(f'"id": {number},', "stdout").string)
        assert record.get("result") == ["a", 2, None, 45][number]
        assert master.is_running()
    master.end_input()
    assert master.wait() == 1
    assert len(master.stdout) == 4


@pytest.mark.parametrize(
    ("task", "options"), [(b'"%s"', []), (b'"%s"', ["--text"]), (b"1.%s", [])], ids=["JSON", "text", "number"]
)
def test_a_task_of_100_megabytes_fails_with_its_line_and_a_remedy(farm: Farm, task: bytes, options: list[str]) -> None:
    farm.write("tasks.jsonl", b"1\n" + task % (b"1" * MORE_THAN_ALLOWED) + b"\n3\n")
    master = farm.run_job("--tasks", "tasks.jsonl", *options, function="functions:same", status=1)
    first, failed, last = farm.in_order()
    assert [first["result"], last["result"]] == (["1", "3"] if options else [1, 3])
    told, _counted = master.said("tasks.jsonl, line 2: .*put a path there")
    assert failed["error"]["message"] in told
    check_silence(master)


def test_a_line_without_an_end_is_refused_as_soon_as_it_is_too_long(farm: Farm) -> None:
    task_master = farm.run("task_master.py", "--port", 0, "--tasks", "/dev/zero", "--results", "results.jsonl")
    check_said(task_master, 2, "/dev/zero: it has zero bytes")

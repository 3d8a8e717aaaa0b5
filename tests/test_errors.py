"""Whatever a user does wrong costs one line: the program, what failed, the thing and a remedy; and an exit status."""

from __future__ import annotations

import os
import re
import socket

import pytest
from lab import ROOT, Farm, Program, check_one_line, check_said

import task_master
import task_worker

MASTER, WORKER = "task_master.py", "task_worker.py"


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        ([MASTER, "--port", "70000"], "--port: 70000 .* 0 .* 65535"),
        ([WORKER, "--port", "0"], "--port: 0 .* 1 .* 65535"),
        ([MASTER, "--workers", "-1"], "--workers: -1 .* it takes "),
        ([WORKER, "--processes", "0"], "--processes: 0 .* it takes "),
        ([MASTER, "--timeout", "0"], "--timeout: 0 .* it takes seconds"),
        ([WORKER, "--wait", "-1"], "--wait: -1 .* it takes seconds(?!.*TASK)"),
        ([WORKER, "--host", "127.0.0.1:5000"], "--host: .*127.0.0.1:5000.* --port"),
        ([MASTER, "--host", "http://localhost"], "--host: .*http://localhost.* is not a host"),
        ([MASTER, "--ssh", "host:22", "1"], "--ssh: .*host:22.* is not a host: .* ports go into ~/.ssh/config"),
        ([MASTER, "--text"], "--text .* --tasks"),
        ([MASTER, "-0"], "-0 .* --tasks"),
        ([MASTER, "--retries", "-1"], "--retries: -1 .* it takes "),
        ([MASTER, "--redeliveries", "many"], "--redeliveries: many .* it takes "),
        ([MASTER, "--max-failures", "0"], "--max-failures: 0 .* it takes "),
        ([MASTER, "--retry-delay", "-1"], "--retry-delay: -1 .* it takes seconds"),
        ([MASTER, "--tasks-per-process", "0"], "--tasks-per-process: 0 .* it takes "),
        ([MASTER, "--batch", "5"], "--batch"),
        ([MASTER, "--workers", "1", "--function", "a:b", "--command", "true"], "not allowed with"),
        ([MASTER, "--tls", "--no-tls"], "not allowed with"),
        ([MASTER, "--tasks", "tasks.jsonl", "1"], "TASK .*--tasks.* one of them"),
        ([MASTER, "--resume"], "--resume .*--results FILE"),
        ([MASTER, "--resume", "--results", "-"], "--resume .*--results FILE"),
        ([MASTER, "--resume", "--results", "results.jsonl"], "--resume .* tasks again.*--tasks"),
        ([MASTER, "--ordered"], "--ordered .*--results FILE"),
        ([MASTER, "--ordered", "--results", "-"], "--ordered .*--results FILE"),
        ([MASTER, "--results", ""], "--results takes the name of a file"),
        ([MASTER, "--workers", "5000"], "--workers: 5000 .* 4096"),
        ([MASTER, "--nonsense"], "--nonsense"),
        ([WORKER, "3"], "unrecognized arguments: 3 .--help"),
        ([MASTER, "1", "--workers", "1", "2"], "unrecognized arguments: 2 .TASKs stand together"),
        ([MASTER, "--text", "-x"], "unrecognized arguments: -x .* behind -- if"),
    ],
    ids=lambda value: " ".join(value).replace(".py", "") if isinstance(value, list) else "",
)
def test_a_wrong_option_is_named_with_what_it_takes(
    argv: list[str], pattern: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *options = argv
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # else the tests behind this one would ignore signals
    with pytest.raises(SystemExit) as leaving:
        (task_master if program == MASTER else task_worker).main(options)
    assert leaving.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = [line for line in output.err.splitlines() if not line.startswith(("usage: ", " "))]
    assert re.search(pattern, line)
    assert line.startswith(program.replace(".py", ": "))


def test_a_port_in_use_is_named(farm: Farm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        master = farm.run(MASTER, "--port", port, "1")
        check_one_line(master, 3, rf"cannot listen on 127\.0\.0\.1:{port}: address already in use \(stop what .*--port\)$")
    assert master.stdout == []


def test_a_worker_for_an_unknown_host_names_it(farm: Farm) -> None:
    worker = farm.run(WORKER, "--no-tls", "--host", "no.such.host.invalid", "--wait", "0.5")
    check_said(worker, 3, r"^task_worker: cannot reach the master at no\.such\.host\.invalid:5000: .*--host")
    assert worker.stdout == ["Connect to server no.such.host.invalid..."]


def test_a_worker_that_finds_no_master_says_so_when_it_has_waited(farm: Farm) -> None:
    worker = farm.worker(1, "--wait", "0.2")
    check_said(worker, 3, r"^task_worker: cannot reach the master at 127\.0\.0\.1:1: connection refused.*is it running")


def test_options_that_are_of_no_use_are_named(farm: Farm) -> None:
    master = farm.master("--retry-delay", 1, "--tasks-per-process", 3, "1")
    farm.worker(master)
    assert master.wait() == 0
    assert master.said("--retry-delay is not used") and master.said("--tasks-per-process is not used.*task_worker")


@pytest.mark.parametrize(
    ("status", "pattern", "argv"),
    [
        (3, r"cannot listen on no\.such\.host\.invalid:0: .*--host", ["--no-tls", "--host", "no.such.host.invalid", "1"]),
        (3, r"cannot listen on 203\.0\.113\.7:0: [a-z ]* \(is --host", ["--no-tls", "--host", "203.0.113.7", "1"]),
        (2, r"cannot read the tasks file missing\.jsonl: no such file", ["--tasks", "missing.jsonl"]),
        (2, r"cannot read .*\.: is a directory", ["--tasks", ".", "--results", "new.jsonl"]),
        (2, r"cannot write the results file no/file: no such file or directory\W+\w+", ["--results", "no/file", "1"]),
        (2, r"cannot write the results file \.: is a directory", ["--results", ".", "1"]),
        (2, f"--resume .*{os.devnull}", ["--results", os.devnull, "--resume", "1"]),
    ],
)
def test_what_is_not_there_or_of_another_kind_is_named(farm: Farm, status: int, pattern: str, argv: list[str]) -> None:
    check_one_line(farm.master(*argv), status, pattern)
    assert not (farm.folder / "new.jsonl").exists()


@pytest.mark.parametrize("name", [MASTER, WORKER])
def test_a_python_that_is_too_old_is_told_so(farm: Farm, name: str) -> None:
    code = f"import runpy, sys; sys.version_info = (3, 8, 18); runpy.run_path({str(ROOT / name)!r}, run_name='__main__')"
    check_one_line(farm.run("-c", code), 2, "3.9 or newer")


def test_a_results_file_that_is_not_empty_is_refused_and_left_alone(farm: Farm) -> None:
    path = farm.write("results.jsonl", "something dear\n")
    check_one_line(farm.master("--results", path, "1"), 2, rf"results file {path} is not empty: .*--resume")
    assert path.read_text() == "something dear\n"


def start_closed(farm: Farm, closed: list[int], *options: object) -> Program:
    return farm.run_after(f"[os.close(n) for n in {closed}]", MASTER, "--port", 0, *options)


@pytest.mark.parametrize("closed", [[0], [1], [0, 1], [0, 1, 2]])
def test_streams_that_are_closed_are_missed_by_nobody(farm: Farm, closed: list[int]) -> None:
    master = start_closed(farm, closed, "--workers", 1, "--results", "results.jsonl", "3", "4")
    assert master.wait() == 0, master.lines
    assert sorted(record["result"] for record in farm.records()) == ["3 * 3 = 9", "4 * 4 = 16"]


@pytest.mark.parametrize(
    ("closed", "options", "pattern"),
    [
        (1, ["1"], "standard output is closed.*use --results FILE"),
        (1, ["--results", "-", "1"], "standard output is closed.*use --results FILE"),
        (0, ["--tasks", "-"], "standard input is closed|cannot read .*standard input"),
    ],
)
def test_a_closed_stream_that_is_wanted_is_missed(farm: Farm, closed: int, options: list[str], pattern: str) -> None:
    check_said(start_closed(farm, [closed], *options), 2, f"^task_master: .*({pattern})")


UNUSABLE = {
    "awkward:missing": ("", r"AttributeError: .*'missing'"),
    "awkward:number": ("number = 3", "it is an? int, not a function"),
    "raises:make": ("raise RuntimeError('the reason')", "RuntimeError: the reason"),
    "raises:lines": ("raise RuntimeError('the first line\\nthe second line')", "RuntimeError: the first line.*the second line"),
    "leaves:make": ("import sys; sys.exit(7)", "SystemExit: 7"),
    "wants:make": ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
    "wrong:wrong": ("def wrong(:", r"SyntaxError: .*wrong\.py"),
    "awkward": ("", "it takes MODULE:NAME"),
    ":make": ("", "it takes MODULE:NAME"),
}


@pytest.mark.parametrize("spec", UNUSABLE)
def test_a_worker_says_why_it_cannot_have_its_function_before_it_connects(farm: Farm, spec: str) -> None:
    text, reason = UNUSABLE[spec]
    farm.write(f"{spec.partition(':')[0]}.py", text)
    worker = farm.worker(1, "--processes", 2, "--function", spec)
    check_one_line(worker, 2, rf"task_worker: --function {spec}: .*{reason}")
    assert worker.stdout == []

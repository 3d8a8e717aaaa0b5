"""Whatever a user does wrong costs one line: the program, what failed, the thing and a remedy; and an exit status."""

from __future__ import annotations

import os
import re
import socket
from typing import Any

import pytest
from conftest import ROOT, Farm, Program

import task_master
import task_worker

MASTER, WORKER = "task_master.py", "task_worker.py"
OTHER_KEY = "another-key-of-32-letters-or-so-"

MODULES = {
    "awkward.py": """
import math

number = 3
circle = []
circle.append(circle)
VALUES = {
    "large": lambda: "x" * 100_000_000,
    "set": lambda: {1, 2},
    "bytes": lambda: b"bytes",
    "NaN": lambda: [math.nan],
    "circle": lambda: circle,
    "key": lambda: {(1, 2): 3},
    "object": object,
    "good": lambda: "good",
}

def make(kind):
    return VALUES[kind]()
""",
    "raises.py": "raise RuntimeError('the reason')\n",
    "raises_lines.py": "raise RuntimeError('the first line\\nthe second line')\n",
    "leaves.py": "import sys; sys.exit(7)\n",
    "wrong.py": "def wrong(:\n",
}


@pytest.fixture
def modules(farm: Farm) -> None:
    for name, text in MODULES.items():
        (farm.folder / name).write_text(text)


def check_error(program: Program, status: int, pattern: str) -> None:
    """The exit status, no traceback, and exactly one line with an error, which is as it should be."""
    assert program.wait() == status, program.stderr
    assert "Traceback" not in "\n".join([*program.stdout, *program.stderr])
    lines = [line for line in program.stderr if re.search(pattern, line)]
    assert len(lines) == 1, (pattern, program.stderr)
    assert re.match(r"task_(master|worker): ", lines[0])
    assert len(lines[0]) < 300


def check_only_error(program: Program, status: int, pattern: str) -> None:
    """As above, and nothing else was said but the usage."""
    check_error(program, status, pattern)
    assert len([line for line in program.stderr if not line.startswith(("usage: ", " "))]) == 1, program.stderr


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        ([MASTER, "--port", "70000"], "--port: 70000 .* 0 .* 65535"),
        ([MASTER, "--port", "-1"], "--port: -1 .* 0 .* 65535"),
        ([MASTER, "--port", "http"], "--port: http .* 0 .* 65535"),
        ([WORKER, "--port", "70000"], "--port: 70000 .* 1 .* 65535"),
        ([WORKER, "--port", "0"], "--port: 0 .* 1 .* 65535"),
        ([MASTER, "--workers", "0"], "--workers: 0 .* it takes "),
        ([MASTER, "--workers", "two"], "--workers: two .* it takes "),
        ([WORKER, "--processes", "0"], "--processes: 0 .* it takes "),
        ([MASTER, "--timeout", "-1"], "--timeout: -1 .* it takes seconds"),
        ([MASTER, "--timeout", "0"], "--timeout: 0 .* it takes seconds"),
        ([MASTER, "--timeout", "nan"], "--timeout: nan .* it takes seconds"),
        ([WORKER, "--wait", "-1"], "--wait: -1 .* it takes seconds"),
        ([WORKER, "--wait", "soon"], "--wait: soon .* it takes seconds"),
        ([MASTER, "--retries", "-1"], "--retries: -1 .* it takes "),
        ([MASTER, "--redeliveries", "many"], "--redeliveries: many .* it takes "),
        ([MASTER, "--max-failures", "0"], "--max-failures: 0 .* it takes "),
        ([MASTER, "--batch", "0"], "--batch: 0 .* it takes "),
        ([MASTER, "--port", "0", "--function", "functions:double"], "--function .* --workers N"),
        ([MASTER, "--port", "0", "--command", "true"], "--command .* --workers N"),
        ([MASTER, "--workers", "1", "--function", "a:b", "--command", "true"], "not allowed with"),
        ([WORKER, "--function", "a:b", "--command", "true"], "not allowed with"),
        ([MASTER, "--tasks", "tasks.jsonl", "1"], "TASK .*--tasks.* one of them"),
        ([MASTER, "--resume"], "--resume .*--results FILE"),
        ([MASTER, "--resume", "--results", "-"], "--resume .*--results FILE"),
        ([MASTER, "--nonsense"], "--nonsense"),
        ([WORKER, "3"], "unrecognized arguments: 3"),
    ],
    ids=lambda value: " ".join(value).replace(".py", "") if isinstance(value, list) else "",
)
def test_a_wrong_option_is_named_with_what_it_takes(argv: list[str], pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *options = argv
    with pytest.raises(SystemExit) as leaving:
        (task_master if program == MASTER else task_worker).main(options)
    assert leaving.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = [line for line in output.err.splitlines() if not line.startswith(("usage: ", " "))]
    assert re.search(pattern, line)
    assert line.startswith(program.replace(".py", ": "))


@pytest.mark.parametrize("program", [MASTER, WORKER])
def test_version_is_one_line_on_standard_output(farm: Farm, program: str) -> None:
    process = farm.run(program, "--version")
    assert process.wait() == 0
    assert len(process.stdout) == 1
    assert re.fullmatch(program.replace(".py", "") + r" \d+\.\d+\.\d+", process.stdout[0])
    assert process.stderr == []


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (
            MASTER,
            "--tasks --text --results --resume --ordered --host --port --authkey-file --tls --workers --function --command "
            "--timeout --retries --redeliveries --max-failures --batch --quiet --version",
        ),
        (WORKER, "--host --port --authkey-file --tls --processes --function --command --wait --quiet --version"),
    ],
)
def test_help_explains_every_option(farm: Farm, program: str, options: str) -> None:
    process = farm.run(program, "--help")
    assert process.wait() == 0
    text = "\n".join(process.stdout)
    explained = text[text.index("options:" if "options:" in text else "optional arguments:") :]
    assert [option for option in options.split() if not re.search(rf"^  {option}\b", explained, re.MULTILINE)] == []
    assert process.stderr == []


# ---- addresses -----------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named(farm: Farm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        master = farm.run(MASTER, "--port", port, "1")
        check_only_error(master, 3, rf"cannot listen on 127\.0\.0\.1:{port}: address already in use.*--port")
    assert master.stdout == []


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"], ids=["unknown", "another's"])
def test_a_host_that_is_not_this_one_cannot_be_listened_on(farm: Farm, host: str) -> None:
    check_only_error(farm.master("--host", host, "1"), 3, rf"cannot listen on {re.escape(host)}:0: .*--host")


def test_a_worker_for_an_unknown_host_names_it(farm: Farm) -> None:
    worker = farm.run(WORKER, "--host", "no.such.host.invalid", "--wait", "0.5")
    check_error(worker, 3, r"cannot reach the master at no\.such\.host\.invalid:5000: .*--host")
    assert worker.stdout == ["Connect to server no.such.host.invalid..."]


def test_a_worker_that_finds_no_master_says_so_when_it_has_waited(farm: Farm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    worker = farm.run(WORKER, "--port", port, "--wait", "0.2")
    check_error(worker, 3, rf"cannot reach the master at 127\.0\.0\.1:{port}: connection refused.*is it running")


# ---- the key -------------------------------------------------------------------------------------------------------


def without_key(farm: Farm) -> dict[str, str]:
    return {name: value for name, value in farm.env().items() if name != "TASK_AUTHKEY"}


def write_key(farm: Farm, content: str, mode: int = 0o600) -> str:
    path = farm.folder / "the.key"
    path.write_text(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("program", [MASTER, WORKER])
def test_a_key_file_that_is_missing_is_named_with_a_remedy(farm: Farm, program: str) -> None:
    process = farm.run(program, "--authkey-file", "missing.key", env=without_key(farm))
    check_only_error(process, 2, r"key file missing\.key: no such file or directory\W+\w+")


@pytest.mark.skipif(os.name != "posix", reason="file modes are of POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o602], ids=oct)
@pytest.mark.parametrize("program", [MASTER, WORKER])
def test_a_key_file_that_others_can_use_is_refused(farm: Farm, program: str, mode: int) -> None:
    path = write_key(farm, farm.key, mode)
    process = farm.run(program, "--authkey-file", path, env=without_key(farm))
    check_only_error(process, 2, rf"key file {path} can be .* by others: chmod 600 {path}")


@pytest.mark.parametrize("content", ["", " \n"], ids=["empty", "blank"])
@pytest.mark.parametrize("program", [MASTER, WORKER])
def test_an_empty_key_file_is_refused(farm: Farm, program: str, content: str) -> None:
    path = write_key(farm, content)
    process = farm.run(program, "--authkey-file", path, env=without_key(farm))
    check_only_error(process, 2, rf"{path} is empty: put .* 16 random bytes")


@pytest.mark.parametrize("program", [MASTER, WORKER])
def test_an_empty_key_in_the_environment_is_refused(farm: Farm, program: str) -> None:
    check_only_error(farm.run(program, env=farm.env(TASK_AUTHKEY="")), 2, "TASK_AUTHKEY is empty: put .* 16 random bytes")


def test_a_worker_without_a_key_says_where_to_copy_it_from(farm: Farm) -> None:
    worker = farm.run(WORKER, "--host", "192.0.2.1", env=without_key(farm))
    check_only_error(worker, 2, rf"no key in {farm.home}/\.task_authkey: copy that file from the master's host")


def test_a_worker_with_another_key_leaves_and_the_master_serves_on(farm: Farm) -> None:
    master = farm.master("3")
    stranger = farm.worker(master, env=farm.env(TASK_AUTHKEY=OTHER_KEY))
    check_error(stranger, 3, rf"the master at 127\.0\.0\.1:{master.port()} refused the key: copy its key file")
    assert (farm.worker(master).wait(), master.wait()) == (0, 0)
    assert master.stdout[-1] == "Result: 3 * 3 = 9"
    assert "Traceback" not in "\n".join(master.stderr)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_short_key_is_refused_beyond_loopback(farm: Farm, host: str) -> None:
    if host == "::" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    master = farm.master("--host", host, "1", env=farm.env(TASK_AUTHKEY="fifteen letters"))
    check_only_error(master, 2, rf"the key has 15 bytes, too few to listen on {host}: use 16 ")


def test_a_short_key_will_do_on_loopback(farm: Farm) -> None:
    master = farm.master("--workers", 1, "3", env=farm.env(TASK_AUTHKEY="short"))
    assert master.wait() == 0


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_tasks_file_that_is_missing_is_named(farm: Farm) -> None:
    check_only_error(farm.master("--tasks", "missing.jsonl"), 2, r"cannot read the tasks file missing\.jsonl: no such file")


def test_a_folder_is_not_a_tasks_file(farm: Farm) -> None:
    (farm.folder / "folder").mkdir()
    check_error(farm.master("--tasks", "folder"), 2, r"cannot read .*folder: is a directory")


@pytest.mark.parametrize("closed", [[0], [1], [0, 1], [0, 1, 2]])
def test_streams_that_are_closed_are_missed_by_nobody(farm: Farm, closed: list[int]) -> None:
    start = f"import os, sys; [os.close(n) for n in {closed}]; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    options = ("--port", 0, "--workers", 1, "--results", "results.jsonl", "3", "4")
    program = farm.run("-c", start, ROOT / "task_master.py", *options)
    assert program.wait() == 0, program.lines
    assert sorted(record["result"] for record in farm.records()) == ["3 * 3 = 9", "4 * 4 = 16"]


@pytest.mark.parametrize("results", [[], ["--results", "-"]], ids=["printed", "records"])
def test_results_for_a_closed_standard_output_are_refused(farm: Farm, results: list[str]) -> None:
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    master = farm.run("-c", code, ROOT / MASTER, "--port", 0, *results, "1")
    check_error(master, 2, "standard output is closed.*use --results FILE")


def test_a_closed_standard_input_is_no_tasks_file(farm: Farm) -> None:
    code = "import os, sys; os.close(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    master = farm.run("-c", code, ROOT / MASTER, "--port", 0, "--tasks", "-")
    check_error(master, 2, "cannot read .*standard input|cannot read the tasks file -")


def test_a_results_file_in_a_missing_folder_is_named_with_a_remedy(farm: Farm) -> None:
    master = farm.master("--results", "folder/results.jsonl", "1")
    check_only_error(master, 2, r"cannot write the results file folder/results\.jsonl: no such file or directory\W+\w+")


def test_a_folder_is_not_a_results_file(farm: Farm) -> None:
    check_only_error(farm.master("--results", ".", "1"), 2, r"cannot write the results file \.: is a directory")


def test_a_results_file_that_is_not_empty_is_refused_and_left_alone(farm: Farm) -> None:
    path = farm.folder / "results.jsonl"
    path.write_text("something dear\n")
    check_only_error(farm.master("--results", path, "1"), 2, rf"results file {path} is not empty: .*--resume")
    assert path.read_text() == "something dear\n"


def test_a_results_file_that_takes_no_more_ends_the_job(farm: Farm) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    master = farm.master("--workers", 1, "--results", "/dev/full", "1")
    check_error(master, 1, "(?=.*/dev/full)(?=.*writ.*no space left on device)")


# ---- the function --------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "awkward:missing": r"AttributeError: .*'missing'",
    "missing:make": r"ModuleNotFoundError: .*'missing' .*looked in ",
    "awkward:number": r"it is an? int, not a function",
    "raises:make": r"RuntimeError: the reason",
    "raises_lines:make": r"RuntimeError: the first line.*the second line",
    "leaves:make": r"SystemExit: 7",
    "wrong:wrong": r"SyntaxError: .*wrong\.py",
    "awkward": r"it takes MODULE:NAME",
    ":make": r"it takes MODULE:NAME",
}


@pytest.mark.parametrize("spec", FUNCTIONS)
def test_a_worker_says_why_it_cannot_have_its_function_before_it_connects(farm: Farm, spec: str, modules: None) -> None:
    worker = farm.run(WORKER, "--port", 1, "--processes", 2, "--function", spec)
    check_only_error(worker, 2, rf"task_worker: --function {spec}: .*{FUNCTIONS[spec]}")
    assert worker.stdout == []


@pytest.mark.parametrize("spec", ["awkward:missing", "awkward:number", "raises:make", "raises_lines:make", "leaves:make"])
def test_a_master_ends_when_its_local_workers_cannot_have_their_function(farm: Farm, spec: str, modules: None) -> None:
    master = farm.master("--workers", 2, "--function", spec, "--results", "results.jsonl", "1")
    check_error(master, 2, rf"task_worker: --function {spec}: .*{FUNCTIONS[spec]}")
    assert "local worker" in master.stderr[-1]
    assert farm.records() == []


# ---- results -------------------------------------------------------------------------------------------------------

REFUSED = {
    "set": ("TypeError", "set"),
    "bytes": ("TypeError", "bytes"),
    "NaN": ("ValueError", "JSON"),
    "circle": ("ValueError", "Circular"),
    "key": ("TypeError", "keys"),
    "object": ("TypeError", "object"),
    "large": ("ValueError", "write it to a file"),
}


def test_a_result_that_is_not_json_or_has_100_megabytes_fails_its_own_task_alone(farm: Farm, modules: None) -> None:
    kinds = [*REFUSED, "good"]
    options: list[Any] = ["--workers", 1, "--function", "awkward:make", "--results", "results.jsonl", "--text"]
    master = farm.master(*options, *kinds)
    assert master.wait() == 1
    records = {record["task"]: record for record in farm.records()}
    assert len(farm.records()) == len(records) == len(kinds)
    assert records["good"]["result"] == "good"
    for kind, (error, word) in REFUSED.items():
        assert records[kind]["error"]["type"] == error
        assert word in records[kind]["error"]["message"]
        assert len([line for line in master.stderr if re.search(rf"task {records[kind]['id']} failed: {error}: ", line)])
    assert "Traceback" not in "\n".join(master.stderr)
    assert len({record["worker"] for record in records.values()}) == 1  # it lived on

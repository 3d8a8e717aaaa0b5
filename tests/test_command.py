"""--command: a shell command for each task, with the quoting, the output, the exit status and the end of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import MEGABYTE, Farm, Program, is_alive, wait_until

pytestmark = pytest.mark.skipif(os.name != "posix" or not shutil.which("sh"), reason="the commands are for a POSIX shell")


def run_command(farm: Farm, template: str, tasks: list[Any], *options: object) -> tuple[dict[int, dict[str, Any]], Program]:
    """Run a job of one local worker process; returns the records by task id, and the master, which has ended."""
    argv = ["--tasks", farm.write_tasks(tasks), "--results", "results.jsonl", "--workers", 1, "--command", template]
    master = farm.master(*argv, *options)
    assert master.wait() in (0, 1), master.stderr
    return {record["id"]: record for record in farm.records()}, master


NASTY = [
    "two  spaces ",
    " \t",
    "",
    "it's",
    'a "quoted" word',
    "$(touch stolen) `touch stolen` ${HOME} $HOME \\ !x",
    "; touch stolen & touch stolen | touch stolen > stolen",
    "two\nlines\n",
    "-n",
    "--help",
    "* ? [a-z] ~ {} %s \\n",
    "ünïcode ☃ 名前",
    "\x01\x7f",
    "x" * 100_000,
]
OTHERS = [3, -1.5, True, None, [1, "two words"], {"to": "me@example.org", "it's": "$(touch stolen)"}]


def test_a_task_arrives_as_one_word_whatever_is_in_it(farm: Farm) -> None:
    records, _ = run_command(farm, "printf %s {}", NASTY)
    assert [records[number]["result"]["stdout"] for number in range(len(NASTY))] == NASTY
    assert not (farm.folder / "stolen").exists()


def test_a_task_that_is_no_string_arrives_as_json(farm: Farm) -> None:
    records, _ = run_command(farm, "printf %s {}", OTHERS)
    assert [json.loads(records[number]["result"]["stdout"]) for number in range(len(OTHERS))] == OTHERS
    assert not (farm.folder / "stolen").exists()


def test_a_file_name_that_is_not_utf_8_finds_its_file(farm: Farm) -> None:
    try:
        Path(os.fsdecode(os.fsencode(farm.folder) + b"/\xff.txt")).write_text("found")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    (farm.folder / "names.txt").write_bytes(b"\xff.txt\n")
    options = ["--tasks", "names.txt", "--text", "--results", "results.jsonl", "--workers", 1]
    assert farm.master(*options, "--command", "cat {}").wait() == 0
    assert farm.records()[0]["result"]["stdout"] == "found"


def test_every_pair_of_braces_is_replaced(farm: Farm) -> None:
    records, _ = run_command(farm, "printf '%s,' {} {}.mp3", ["a b"])
    assert records[0]["result"]["stdout"] == "a b,a b.mp3,"


def test_success_gives_exit_status_and_both_streams(farm: Farm) -> None:
    records, _ = run_command(farm, "echo out {}; echo err {} >&2; cat", ["x"])  # `cat` finds its input empty
    assert records[0]["result"] == {"exit": 0, "stdout": "out x\n", "stderr": "err x\n"}


def test_another_exit_status_is_an_error_that_names_it(farm: Farm) -> None:
    records, master = run_command(farm, "echo trouble >&2; exit {}", [0, 1, 3, 255])
    assert master.wait() == 1
    assert records[0]["result"]["exit"] == 0
    for number, status in ((1, 1), (2, 3), (3, 255)):
        assert re.search(f"exit status {status}.*trouble", records[number]["error"]["message"], re.DOTALL)
        assert "result" not in records[number]


@pytest.mark.parametrize(
    ("template", "words"), [("no-such-program {}", "exit status 127.*not found"), ("kill -9 $$; {}", "SIGKILL")]
)
def test_a_command_that_ends_badly_is_an_error_that_says_how(farm: Farm, template: str, words: str) -> None:
    records, _ = run_command(farm, template, [1])
    assert re.search(words, records[0]["error"]["message"], re.DOTALL)


def test_the_reason_that_a_talkative_command_gives_last_is_seen(farm: Farm) -> None:
    banner = "i=0; while [ $i -lt 1000 ]; do echo 'built with every option there is' >&2; i=$((i+1)); done; "
    records, master = run_command(farm, banner + "echo 'no such codec' >&2; exit {}", [1])
    assert "no such codec" in records[0]["error"]["message"]
    assert any("no such codec" in line for line in master.stderr if "task 0 failed" in line)


def test_a_task_that_cannot_be_an_argument_fails_alone(farm: Farm) -> None:
    records, _ = run_command(farm, "printf %s {}", ["a\x00b", "good"])
    assert "null byte" in records[0]["error"]["message"]
    assert records[1]["result"]["stdout"] == "good"


@pytest.mark.parametrize(("stream", "redirection"), [("stdout", ""), ("stderr", ">&2")])
def test_output_is_kept_up_to_one_megabyte_and_cut_visibly(farm: Farm, stream: str, redirection: str) -> None:
    sizes = [MEGABYTE, MEGABYTE + 1, 3 * MEGABYTE]
    records, _ = run_command(farm, f"head -c {{}} /dev/zero | tr '\\0' x {redirection}", sizes)
    for number, size in enumerate(sizes):
        output = records[number]["result"][stream]
        assert output[:MEGABYTE] == "x" * MEGABYTE
        assert re.fullmatch(rf".*\b{size - MEGABYTE}\b.*cut.*" if size > MEGABYTE else "", output[MEGABYTE:], re.DOTALL)
        assert len(output) < MEGABYTE + 100


def test_output_that_is_not_utf_8_is_shown_with_replacements(farm: Farm) -> None:
    records, master = run_command(farm, "printf 'a\\377b'; printf '\\303' >&2; : {}", [1])
    assert records[0]["result"] == {"exit": 0, "stdout": "a\ufffdb", "stderr": "\ufffd"}
    assert master.wait() == 0


def test_the_time_limit_kills_the_whole_command_with_what_it_left_in_the_background(farm: Farm) -> None:
    template = "sleep 300 & echo $! >>pids; (sleep 300; echo) | (echo $$ >>pids; cat) & (sleep 300 & echo $! >>pids; wait) & wait"
    records, master = run_command(farm, f"[ {{}} = 2 ] || {{ {template}; }}", [1, 2], "--timeout", 0.7)
    assert records[0]["error"]["type"] == "TimeoutError"
    assert "0.7 s" in records[0]["error"]["message"]
    assert "result" in records[1]
    pids = [int(line) for line in (farm.folder / "pids").read_text().split()]
    assert len(pids) == 3
    wait_until(lambda: not [pid for pid in pids if psutil.pid_exists(pid) and is_alive(psutil.Process(pid))])
    assert master.wait() == 1


def test_a_worker_of_its_own_runs_its_own_command(farm: Farm) -> None:
    master = farm.master("--results", "results.jsonl", "1")
    worker = farm.worker(master, "--command", "echo {} $(basename $PWD)")
    assert (worker.wait(), master.wait()) == (0, 0)
    assert farm.records()[0]["result"]["stdout"] == f"1 {farm.folder.name}\n"

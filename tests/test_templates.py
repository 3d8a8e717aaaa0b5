"""--command: where a task goes in the template, which templates are refused, and that no task's text ever becomes code."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import Any

import psutil
import pytest
from lab import PATIENCE, Farm, Program

pytestmark = pytest.mark.skipif(os.name != "posix" or not shutil.which("sh"), reason="the commands are for a POSIX shell")

CODE = "$(touch stolen) `touch stolen`; touch stolen & touch stolen | touch stolen\n\"; touch stolen; '; touch stolen; \\"
WORDS = ["plain", "two  words", "", "-n", "* ~ {} %s {x}", "it's", 'a "quoted" \\ word', "ünï ☃", "EOF\ntouch stolen\n", CODE]


def run_command(farm: Farm, template: str, tasks: list[Any], *options: object) -> tuple[list[dict[str, Any]], Program]:
    """Run a job of one local worker process; returns the records in the order of the tasks, and the master, which has ended."""
    argv = ["--tasks", farm.write_tasks(tasks), "--results", "results.jsonl", "--workers", 1, "--command", template]
    master = farm.master(*argv, *options)
    assert master.wait() in (0, 1), master.stderr
    assert not (farm.folder / "stolen").exists()
    return sorted(farm.records(), key=lambda record: record["id"]), master


def outputs(farm: Farm, template: str, tasks: list[Any]) -> list[str | None]:
    return [record.get("result", {}).get("stdout") for record in run_command(farm, template, tasks)[0]]


@pytest.mark.parametrize("template", ["printf %s", "printf %s {}", 'printf %s "$TASK"', 'x={}; printf %s "$x"', "printenv TASK"])
def test_a_task_arrives_as_it_is_appended_in_braces_or_as_a_variable(farm: Farm, template: str) -> None:
    got = outputs(farm, template, WORDS)
    assert [text.removesuffix("\n") if template == "printenv TASK" else text for text in got if text is not None] == WORDS


def test_a_template_that_names_no_task_gets_it_as_its_last_word(farm: Farm) -> None:
    (farm.folder / "some file").write_text("some text")
    assert outputs(farm, "cat", ["some file", "no such file"]) == ["some text", None]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("echo ${TASK##*/}", "b c.tar.gz"),
        ('echo "${TASK%.*}" $TASK_ID', "/a/b c.tar 0"),
        ("echo $TASK_ID {}", "0 /a/b c.tar.gz"),
        ("echo {}.{}", "/a/b c.tar.gz./a/b c.tar.gz"),
        ('echo "$(basename "$TASK")"', "b c.tar.gz"),
        ("echo $(dirname {})", "/a"),
        ("echo {} | awk '{print $1}'", "/a/b"),
        ("echo {} | awk '{print}' | sed -E 's/[a-z]{3}.//'", "/a/b c.gz"),
        ("{ echo {}; } | { cat; }", "/a/b c.tar.gz"),
        ('f() { echo "$1"; }; f {}', "/a/b c.tar.gz"),
        ("X=1; echo ${X} ${Y:-{}} {}", None),
        ("sh -c 'echo \"$TASK\"'", "/a/b c.tar.gz"),
        ("cat <<'EOF'\n$TASK\nEOF", "$TASK"),
        ("cat <<EOF\n${TASK}\nEOF", "/a/b c.tar.gz"),
        ("echo a{1,2} {file name} {-} {}", "/a/b c.tar.gz"),
    ],
)
def test_the_braces_of_the_shell_and_of_awk_stay(farm: Farm, template: str, expected: str | None) -> None:
    (got,) = outputs(farm, template, ["/a/b c.tar.gz"])
    assert got is not None
    if expected is None or "file name" in template:
        assert got.endswith(" /a/b c.tar.gz\n")
    else:
        assert got == expected + "\n"


def test_a_name_in_braces_stands_for_a_member(farm: Farm) -> None:
    tasks = [{"to": CODE, "n": 1, "more": [1, "it's"]}, {"to": "x"}, {"n": 2}, "text", 5, [{"to": 1}], None]
    records, _ = run_command(farm, "printf '%s|%s|%s' {to} {n} {more}", [*tasks, {"n": None, "to": True, "more": {"a": 1}}])
    *parts, more = records[0]["result"]["stdout"].split("|")
    assert ["|".join(parts[:-1]), parts[-1], json.loads(more)] == [CODE, "1", [1, "it's"]]
    assert records[-1]["result"]["stdout"].startswith("true|null|{")
    assert ["error" in record for record in records] == [False, *[True] * 6, False]
    assert "more" in records[1]["error"]["message"] or "n" in records[1]["error"]["message"]
    assert "to" in records[2]["error"]["message"]


QUOTED = ['echo "{}"', "echo '{}'", 'echo "a {} b"', "sh -c 'echo {}'", "awk '{print \"{}\"}'", 'echo x"y{}"', "echo \"'{}'\""]
UNPLACED = ["sort | uniq", "cd x; make", "sleep 1 & wait", "cat <x", "cat >x", "make && make install", "cd x\nmake", "make 2>&1"]


@pytest.mark.parametrize(("template", "remedy"), [(t, "quot") for t in QUOTED] + [(t, r"\{\}|TASK") for t in UNPLACED])
@pytest.mark.parametrize("program", ["master", "worker"])
def test_a_template_that_would_go_wrong_is_refused_before_anything_is_read(
    farm: Farm, program: str, template: str, remedy: str
) -> None:
    if program == "master":
        ended = farm.master("--results", "results.jsonl", "--workers", 1, "--command", template, '"$(touch stolen)"')
    else:
        ended = farm.run("task_worker.py", "--port", 1, "--wait", 0.1, "--command", template)
    assert ended.wait() == 2, ended.stderr
    assert re.search(f"--command.*({remedy})", ended.stderr[-1])
    assert len(ended.stderr) == 1
    assert not (farm.folder / "results.jsonl").exists()


ANYWHERE = r"""
echo "$(echo {})" / echo `echo {}` / echo "`echo {}`" / echo $(echo $(echo {})) / echo \{} {} / echo \"{}\" / echo $((1 + 1)) {}
case {} in x) echo {};; *) echo {};; esac / printf "%s" "a"{}"b" / echo ${X:-{}} / echo "a" {} "{}" / echo '{}' "{}"
"""
LINES = [
    "cat <<EOF\n{}\nEOF",
    "cat <<'EOF'\n{}\nEOF",
    "cat <<EOF\n$(echo {})\n`echo {}`\nEOF",
    "echo # {}\necho {}",
    "cat <<E\n'{}'\nE",
]


@pytest.mark.parametrize("template", [*re.split("\n| / ", ANYWHERE.strip()), *LINES])
@pytest.mark.parametrize("braces", ["{}", "{to}"])
def test_wherever_a_task_stands_its_text_is_no_code(farm: Farm, template: str, braces: str) -> None:
    """Run rightly, or refused."""
    texts = [CODE, "$(touch stolen)", "`touch stolen`", '"; touch stolen; "', "'; touch stolen; '", "\nEOF\ntouch stolen\n"]
    farm.write_tasks(texts if braces == "{}" else [{"to": text} for text in texts])
    options = ["--tasks", "tasks.jsonl", "--results", "results.jsonl", "--workers", 1]
    assert farm.master(*options, "--command", template.replace("{}", braces)).wait() in (0, 1, 2)
    assert not (farm.folder / "stolen").exists()


def test_a_failed_command_keeps_its_status_and_both_streams_as_members(farm: Farm) -> None:
    records, _ = run_command(farm, "echo out; echo err >&2; exit {}", [3, 0])
    error = records[0]["error"]
    assert {name: error[name] for name in ("type", "traceback", "exit", "stdout", "stderr")} == {
        "type": "CommandFailed", "traceback": "", "exit": 3, "stdout": "out\n", "stderr": "err\n"
    }  # fmt: skip
    assert "3" in error["message"]
    assert records[1]["result"] == {"exit": 0, "stdout": "out\n", "stderr": "err\n"}


def test_a_command_that_a_signal_ends_is_a_failed_command(farm: Farm) -> None:
    records, _ = run_command(farm, "echo out; kill -{} $$", ["TERM"])
    assert (records[0]["error"]["type"], records[0]["error"]["stdout"]) == ("CommandFailed", "out\n")
    assert records[0]["error"]["exit"] != 0


@pytest.mark.parametrize("template", ["printf %s {} | wc -c", "printf %s", "wc -c <<EOF\n$TASK\nEOF"])
def test_a_task_of_200_kilobytes_is_run_or_is_an_error_of_its_own(farm: Farm, template: str) -> None:
    records, _ = run_command(farm, template, ["x" * 200_000, "good"], "--retries", 0)
    assert "result" in records[1]
    if "error" in records[0]:
        assert re.search("too long|too large|longer|bytes|size", records[0]["error"]["message"])
        assert records[0]["error"]["type"] != "ProcessDied"
    else:
        assert "20000" in records[0]["result"]["stdout"] or len(records[0]["result"]["stdout"]) == 200_000


def test_what_a_command_leaves_in_the_background_is_not_waited_for_and_ends_with_the_worker(farm: Farm) -> None:
    records, _ = run_command(farm, "sleep 1000 & echo {} $!", ["a"])
    word, pid = records[0]["result"]["stdout"].split()
    assert word == "a"
    left = [psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else []
    _, alive = psutil.wait_procs(left, timeout=PATIENCE)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []

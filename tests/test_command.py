"""--command: where a task goes in the template, which templates are refused, and how a command's end becomes a record.

No task's text ever becomes code: where one tries to, there would be a file `stolen`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from lab import MEGABYTE, Farm, Program, check_one_line

from task_worker import Command, CommandFailed, Failure, check_template, parse_template

CODE = "$(touch stolen) `touch stolen`; touch stolen & touch stolen | touch stolen\n\"; touch stolen; '; touch stolen; \\"
WORDS = [
    "plain", "two  words ", " \t", "", "-n", "--help", "* ? [a-z] ~ {} %s \\n {x}", "it's", 'a "quoted" \\ word', "${HOME} $HOME",
    "two\nlines\n", "ünï ☃ 名前", "\x01\x7f", "EOF\ntouch stolen\n", CODE, "x" * 100_000,
]  # fmt: skip
OTHERS = [3, -1.5, True, None, [1, "two words"], {"to": "me@example.org", "it's": "$(touch stolen)"}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(farm: Farm, template: str, tasks: list[Any], *options: object) -> tuple[list[dict[str, Any]], Program]:
    """Run a job of one local worker process; returns the records in the order of the tasks, and the master, which has ended."""
    argv = ["--tasks", farm.write_tasks(tasks), "--results", "results.jsonl", "--workers", 1, "--command", template]
    master = farm.master(*argv, *options)
    assert master.wait() in (0, 1), master.stderr
    assert not (farm.folder / "stolen").exists()
    return farm.in_order(), master


def call(template: str, task: Any, text: str | None = None) -> dict[str, Any]:
    """The result of a command that is called here, in the folder of the farm, as a child calls it. Raises what it raises."""
    command = Command(template)
    command.task_id, command.text = "0", text or json.dumps(task)
    return command(task)


@pytest.mark.parametrize("template", ["printf %s", "printf %s {}", 'printf %s "$TASK"', 'x={}; printf %s "$x"', "printenv TASK"])
def test_a_task_arrives_as_one_word_whatever_is_in_it_or_else_as_json(farm: Farm, template: str) -> None:
    ends = "\n" if template == "printenv TASK" else ""
    records, _ = run_command(farm, template, [*WORDS, *OTHERS])
    got = [record["result"]["stdout"].removesuffix(ends) for record in records if "result" in record]
    assert got[: len(WORDS)] == WORDS
    assert [json.loads(text) for text in got[len(WORDS) :]] == OTHERS


def test_a_file_name_that_is_not_utf_8_finds_its_file(farm: Farm) -> None:
    try:
        Path(os.fsdecode(os.fsencode(farm.folder) + b"/\xff.txt")).write_text("found")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    farm.write("names.txt", b"\xff.txt\n")
    farm.run_job("--tasks", "names.txt", "--text", "--command", "cat")
    assert farm.records()[0]["result"]["stdout"] == "found"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("echo ${TASK##*/}", "b c.tar.gz"),
        ("echo /opt/TASKS MYTASK", "/opt/TASKS MYTASK /a/b c.tar.gz"),
        ("echo {größe} {}", "{größe} /a/b c.tar.gz"),
        ("echo one; echo {} >>/dev/stdout; echo two", "one\n/a/b c.tar.gz\ntwo"),
        ('echo "${TASK%.*}" $TASK_ID', "/a/b c.tar 0"),
        ("echo {}.{}", "/a/b c.tar.gz./a/b c.tar.gz"),
        ("echo $(dirname {})", "/a"),
        ("echo {} | awk '{print $1}'", "/a/b"),
        ("echo {} | awk '{print}' | sed -E 's/[a-z]{3}.//'", "/a/b c.gz"),
        ("{ echo {}; } | { cat; }", "/a/b c.tar.gz"),
        ('f() { echo "$1"; }; f {}', "/a/b c.tar.gz"),
        ("X=1; echo ${X} ${Y:-{}} {}", None),
        ("cat <<'EOF'\n$TASK\nEOF", "$TASK"),
        ("cat <<EOF\n${TASK}\nEOF", "/a/b c.tar.gz"),
        ("cat <<EOF\ninput={}\nEOF", "input=/a/b c.tar.gz"),
        ("cat <<-EOF | tail -1\n\tit's\n\t{}\n\tEOF", "/a/b c.tar.gz"),
        ("cat <<E - /dev/null; echo {}\nE", "/a/b c.tar.gz"),
        ("tr a A <<E | cat; printf '%s|' {}; echo\n{}\nE", "/A/b c.tAr.gz\n/a/b c.tar.gz|"),
        ("cat <<E >f-${TASK_ID}; cat f-*\nx={}\nE", "x=/a/b c.tar.gz"),
        ("cat > f <<E\nE\nprintf '%s|' {}; echo\ncat >> f <<E\nx\nE", "/a/b c.tar.gz|"),
        ("cat <<END-1.x\n{}\nEND-1.x", "/a/b c.tar.gz"),
        ("(cat <<E)\n{}\nE", "/a/b c.tar.gz"),
        ("cat <<E\nC:\\{} \\\\{}\nE", "C:\\/a/b c.tar.gz \\/a/b c.tar.gz"),
        ("cat <<E; printf '%s|' 'a\nb' {}; echo\nx\nE", "x\na\nb|/a/b c.tar.gz|"),
        ("cat <<E; echo $((1<<nn+1)) $((1 << 2))\n{}\nE", "/a/b c.tar.gz\n2 4"),
        ("x=$((1<<n))\nprintf '%s|' {}\nn=3; echo", "/a/b c.tar.gz|"),
        ("echo '\\`' {}", "\\` /a/b c.tar.gz"),
        ("echo a{1,2} {file name} {-} {}", None),
        ("cat {} - <<'E' 2>&1 | tail -1\nhere\nE\necho {}", "here\n/a/b c.tar.gz"),
        ('echo "$(echo "a")" {}', "a /a/b c.tar.gz"),
        ("# don't {}\necho {} # it's $#{}", "/a/b c.tar.gz"),
        ("echo ${#} {} | sed 's/{.}//'", "0 /a/b c.tar.gz"),
        ("echo a#'b' {}; echo $# ${#TASK} \\#'c'", "a#b /a/b c.tar.gz\n0 13 #c"),
        ("x=${TASK%%r #*}; y=${TASK#'/a'}; echo $y {} ${x:+1} #'", "/b c.tar.gz /a/b c.tar.gz 1"),
        ("printf '%s|' {} $(echo x)#{}; echo $$$${} | tr -d 0-9", "/a/b c.tar.gz|x#/a/b c.tar.gz|/a/b c.tar.gz"),
        ("echo \\ #'\n' {}", " #\n /a/b c.tar.gz"),
    ],
)
def test_the_braces_of_the_shell_and_of_awk_stay(template: str, expected: str | None) -> None:
    got = call(template, "/a/b c.tar.gz")["stdout"]
    assert got.endswith(" /a/b c.tar.gz\n") if expected is None else got == expected + "\n"


@pytest.mark.parametrize("part", ["\\", "a", "${", "${'", "'a'", '"', "#", " # ", "<<E\n", "\\ "])
def test_no_template_takes_long_to_read(part: str) -> None:
    with contextlib.suppress(Failure):
        parse_template("echo {} ${" + 1000 * part)


def test_a_name_in_braces_stands_for_a_member(farm: Farm) -> None:
    tasks = [{"to": CODE, "n": 1, "more": [1, "it's"]}, {"to": "x"}, {"n": 2}, "text", 5, [{"to": 1}], None]
    records, _ = run_command(farm, "printf '%s|%s|%s' {to} {n} {more}", [*tasks, {"n": None, "to": True, "more": {"a": 1}}])
    *parts, more = records[0]["result"]["stdout"].split("|")
    assert ["|".join(parts[:-1]), parts[-1], json.loads(more)] == [CODE, "1", [1, "it's"]]
    assert records[-1]["result"]["stdout"].startswith("true|null|{")
    assert ["error" in record for record in records] == [False, *[True] * 6, False]
    assert re.search(r"has \{(more|n)\}, but the task no member (more|n) ", records[1]["error"]["message"])
    assert re.search("the task no member to ", records[2]["error"]["message"])
    assert call("echo {1} {2020}", {"1": "x", "2020": "y"})["stdout"] == "x y\n"


def test_a_command_cannot_reach_what_its_process_shares_with_the_worker(farm: Farm) -> None:
    records, _ = run_command(farm, "ls -l /proc/self/fd; true {}", [1])
    assert not re.search("memfd|socket", records[0]["result"]["stdout"]), records


@pytest.mark.parametrize("number", ["3.10", "1e5", "-0.0", "12"])
def test_a_number_arrives_as_it_was_written(number: str) -> None:
    assert call("printf %s", json.loads(number), number)["stdout"] == number


def test_a_member_arrives_as_it_was_written_whatever_the_locale_is(farm: Farm) -> None:
    farm.write("tasks.jsonl", '{"v": 3.10, "name": "\u00fc", "all": [1, "3"]}\n')
    ascii_only = farm.env(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    farm.run_job("--tasks", "tasks.jsonl", "--command", "printf %s {v}/{name}/{all}", env=ascii_only)
    assert farm.records()[0]["result"]["stdout"] == '3.10/\u00fc/[1, "3"]'


@pytest.mark.parametrize(
    "template", ['echo {src} "{dst}"', "echo {src} '{dst}'", 'echo "$(echo "{dst}")"', "echo {src}; cat <<'E'\n{dst}\nE"]
)
def test_a_task_whose_member_stands_in_quotes_fails_and_says_so(template: str) -> None:
    with pytest.raises(ValueError, match=r"\{dst\} in quotes"):
        call(template, {"src": "a", "dst": "b"})


def test_a_name_in_quotes_that_is_no_member_stays() -> None:
    assert call("echo {src} '{dst}'", {"src": "a"})["stdout"] == "a {dst}\n"


def test_a_command_that_is_given_no_tasks_runs_on_random_numbers_and_says_so(farm: Farm) -> None:
    assert farm.run_job("--command", "echo").said("no tasks are given.*--tasks.*random numbers")
    assert len(farm.records()) == 10


QUOTED = r"""
echo "{}" / echo '{}' / echo "a {} b" / sh -c 'echo {}' / awk '{print "{}"}' / echo x"y{}" / echo "'{}'" / echo "$(echo "{}")"
echo "`basename "{}"`"
"""
QUOTED_LINES = [
    "cat <<'E'\n{}\nE",
    "cat <<- \\E\n{}\nE",
    "cat <<-'E'\n\t{}\n\tE",
    "cat <<'END-1'\n{}\nEND-1",
    "cat <<E\n$(echo {})\nE",
]
UNPLACED = "#echo / sort | uniq / echo hi # note / cd x; make / ls & / cat <x / cat >x / make && ls / make 2>&1"
UNPLACED_LINES = ["cd x\nmake", "echo hi\t# note"]


def split(templates: str) -> list[str]:
    return re.split("\n| / ", templates.strip())


@pytest.mark.parametrize(
    ("template", "remedy"),
    [
        *[(template, "quot") for template in [*split(QUOTED), *QUOTED_LINES]],
        ("paste - <<A /dev/fd/3 3<<B\n{}\nA\n{}\nB", "two here-documents"),
        *[(template, r"\{\}|TASK") for template in [*split(UNPLACED), *UNPLACED_LINES]],
        *[(f"convert {{}} {text}", "quotes") for text in ('"{.}.png"', '"$(echo {/})"', "<<E\n{.}\n$(ls)\nE")],
        *[(f"convert {{}} {braces}.png", "GNU parallel") for braces in ("{.}", "{/}", "{//}", "{/.}", "{#}", "{%}")],
    ],
)
def test_a_template_that_would_go_wrong_is_refused_with_the_remedy(template: str, remedy: str) -> None:
    with pytest.raises(Failure, match=f"--command.*({remedy})"):
        check_template(template)


@pytest.mark.parametrize("program", ["master", "worker"])
def test_a_refused_template_is_one_line_before_anything_is_read(farm: Farm, program: str) -> None:
    options = ("--results", "results.jsonl", "--workers", 1, "1") if program == "master" else ("--wait", 0.1)
    refused = farm.run(f"task_{program}.py", "--port", 1, "--command", "cat <<'E'\n{}\nE", *options)
    check_one_line(refused, 2, "--command.*quot")
    assert not farm.results.exists()


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


@pytest.mark.parametrize("template", [*split(ANYWHERE), *LINES])
@pytest.mark.parametrize("braces", ["{}", "{to}"])
def test_wherever_a_task_stands_its_text_is_no_code(folder: Path, template: str, braces: str) -> None:
    """Run rightly, or refused."""
    for text in (CODE, "$(touch stolen)", "`touch stolen`", '"; touch stolen; "', "'; touch stolen; '", "\nEOF\ntouch stolen\n"):
        with contextlib.suppress(Failure, CommandFailed, ValueError):
            call(template.replace("{}", braces), text if braces == "{}" else {"to": text})
    assert not (folder / "stolen").exists()


def test_the_exit_status_and_both_streams_are_the_result_or_members_of_the_error(farm: Farm) -> None:
    """The standard input is empty, so that `cat` ends."""
    records, master = run_command(farm, "echo out; echo trouble >&2; cat; exit {}", [0, 1, 3, 255])
    assert master.wait() == 1
    assert records[0]["result"] == {"exit": 0, "stdout": "out\n", "stderr": "trouble\n"}
    for record in records[1:]:
        assert re.fullmatch(f"exit status {record['task']}: trouble", record["error"].pop("message"))
        streams = {"exit": record["task"], "stdout": "out\n", "stderr": "trouble\n"}
        assert record["error"] == {"type": "CommandFailed", "traceback": "", **streams}
        assert "result" not in record


@pytest.mark.parametrize(
    ("template", "words"), [("no-such-program {}", "exit status 127.*not found"), ("echo out; kill -9 $$; {}", "SIGKILL")]
)
def test_a_command_that_ends_badly_is_an_error_that_says_how(farm: Farm, template: str, words: str) -> None:
    error = run_command(farm, template, [1])[0][0]["error"]
    assert re.search(words, error["message"], re.DOTALL)
    assert (error["type"], error["exit"] != 0) == ("CommandFailed", True)
    assert error["stdout"] == "out\n" * ("kill" in template)


def test_the_reason_that_a_talkative_command_gives_last_is_seen(farm: Farm) -> None:
    banner = "i=0; while [ $i -lt 1000 ]; do echo 'built with every option there is' >&2; i=$((i+1)); done; "
    records, master = run_command(farm, banner + "echo 'no such codec' >&2; exit {}", [1])
    assert "no such codec" in records[0]["error"]["message"]
    assert master.said("task 0 failed.*no such codec")


@pytest.mark.parametrize("template", ["printf %s {} | wc -c", "printf %s", "wc -c <<EOF\n$TASK\nEOF"])
@pytest.mark.parametrize("task", ["x" * 200_000, "a\x00b"], ids=["200 kilobytes", "a zero byte"])
def test_a_task_that_is_too_much_for_the_environment_is_run_or_fails_alone(farm: Farm, template: str, task: str) -> None:
    bad, good = run_command(farm, template, [task, "good"])[0]
    assert "result" in good
    if "error" in bad:
        assert re.search("too long for a command.*path|null byte", bad["error"]["message"])
        assert bad["error"]["type"] != "ProcessDied"
    else:
        assert "20000" in bad["result"]["stdout"] or len(bad["result"]["stdout"]) == 200_000


@pytest.mark.parametrize(("stream", "redirection"), [("stdout", ""), ("stderr", ">&2")])
@pytest.mark.parametrize("more", [0, 1, 2 * MEGABYTE])
def test_output_is_kept_up_to_one_megabyte_and_cut_visibly(stream: str, redirection: str, more: int) -> None:
    output = call(f"head -c {{}} /dev/zero | tr '\\0' x {redirection}", MEGABYTE + more)[stream]
    assert output[:MEGABYTE] == "x" * MEGABYTE
    assert re.fullmatch(rf".*\b{more}\b.*cut.*" if more else "", output[MEGABYTE:], re.DOTALL)
    assert len(output) < MEGABYTE + 100


def test_output_that_is_not_utf_8_is_shown_with_replacements() -> None:
    shown = {"exit": 0, "stdout": "a\ufffdb", "stderr": "\ufffd"}
    assert call("printf 'a\\377b'; printf '\\303' >&2; : {}", 1) == shown

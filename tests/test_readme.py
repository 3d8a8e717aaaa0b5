"""Every block of the README is run as it stands there, and what it states of options, figures and statuses is compared."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import inspect
import json
import os
import queue
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from lab import BLOCKS, PATIENCE, README, ROOT, Farm, Program, SshNet, find_block, free_port, make_script, needs_sshd, wait_until

import task_master
import task_worker

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what aiosmtpd imports is deprecated in Python 3.14
    from aiosmtpd.controller import Controller

needs = pytest.mark.skipif
needs_matplotlib = needs(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


def test_no_block_is_without_a_test() -> None:
    tests = "".join(Path(__file__).with_name(name).read_text() for name in ("test_readme.py", "test_slurm.py"))
    asked = re.findall(r"""(?:find_block|write|read_transcript)\((["'])(.+?)\1\)""", tests)
    assert [key for key in BLOCKS if not any(key.startswith(start) for _, start in asked)] == []
    assert README.count("\n```") == 2 * len(BLOCKS), "a block has no language, or two have the same name"


class Newcomer:
    """Follows the README: has the two files in a clean folder, an empty home, and `python3` and `bash` on the PATH."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self.home = farm.home
        self.folder = farm.folder / "clean"
        self.bin = farm.folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for name in ("task_master.py", "task_worker.py"):
            shutil.copy(ROOT / name, self.folder)
        self.use_python(sys.executable)

    def use_python(self, python: str) -> None:
        make_script(self.bin / "python3", f'exec {shlex.quote(python)} "$@"')

    def env(self, **more: str) -> dict[str, str]:
        return self._farm.env(PATH=f"{self.bin}{os.pathsep}{os.environ['PATH']}", TASK_AUTHKEY=None, **more)

    def write(self, name: str) -> Path:
        """Save the block of this name."""
        (self.folder / name).write_text(find_block(name))
        return self.folder / name

    def bash(self, text: str, stdin: int = subprocess.DEVNULL, **env: str) -> Program:
        """Start a block, or any command."""
        return self._farm.start(["bash", "-c", text], self.env(**env), cwd=self.folder, stdin=stdin)

    def run(self, text: str, status: int = 0) -> Program:
        """A block, or any command, to its end."""
        program = self.bash(text)
        assert program.wait() == status, program.lines
        return program

    def master(self, argv: str, status: int = 0) -> Program:
        """A master on a free port with records in results.jsonl, to its end."""
        return self.run(f"python3 task_master.py --port 0 --results results.jsonl {argv}", status)

    def records(self, name: str = "results.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture
def newcomer(farm: Farm) -> Newcomer:
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    return Newcomer(farm)


@pytest.fixture
def port_5000() -> None:
    """The commands of the README name no port; skips the test when the default one stays taken."""
    give_up_at = time.monotonic() + 20
    while True:
        try:
            socket.create_server(("127.0.0.1", 5000)).close()
            return
        except OSError:
            if time.monotonic() > give_up_at:
                pytest.skip("port 5000 is taken by another program")
            time.sleep(0.2)


def read_transcript(start: str) -> tuple[str, list[str]]:
    """The command of a transcript, and the lines that it prints, without their figures."""
    command, *lines = find_block(start).splitlines()
    return command.removeprefix("$ "), [hide_figures(line) for line in lines if not line.startswith("[...")]


def hide_figures(line: str) -> str:
    return re.sub(r"\d+", "N", line)


def check_transcript(shown: list[str], printed: list[str]) -> None:
    """What is shown was printed, in this order, perhaps with more in between."""
    rest = iter([hide_figures(line) for line in printed])
    assert all(line in rest for line in shown), (shown, printed)


@pytest.mark.usefixtures("port_5000")
def test_the_two_terminals_print_what_is_shown(newcomer: Newcomer) -> None:
    worker_command, worker_lines = read_transcript("$ python3 task_worker.py")
    master_command, master_lines = read_transcript("$ python3 task_master.py")
    worker = newcomer.bash(worker_command)
    worker.wait_line("waiting for")
    master = newcomer.bash(master_command)
    assert (master.wait(), worker.wait()) == (0, 0)
    check_transcript(master_lines, master.stdout)
    check_transcript(worker_lines, worker.stdout)
    assert len(master.stdout) == 21


@pytest.mark.usefixtures("port_5000")
def test_one_command_does_it_too(newcomer: Newcomer) -> None:
    master = newcomer.run(find_block("python3 task_master.py --workers 2"))
    assert len([line for line in master.stdout if re.fullmatch(r"Result: (\d+) \* \1 = \d+", line)]) == 10
    assert "worker exit." in master.stderr
    starts = ("task_master: ", "task_worker: ", "Connect ", "run task ", "worker exit.")
    assert all(line.startswith(starts) for line in master.stderr)


@pytest.mark.usefixtures("port_5000")
def test_words_are_counted_and_the_record_has_the_members_shown(newcomer: Newcomer) -> None:
    newcomer.write("words.py")
    (newcomer.folder / "README.md").write_text("three words here")
    newcomer.run(find_block("find . -name '*.md'"))
    (record,) = newcomer.records("counts.jsonl")
    assert (record["task"], record["result"]) == ("./README.md", 3)
    assert list(record) == list(json.loads(find_block('{"id": 0')))


def read_table(heading: str) -> list[list[str]]:
    """The rows below a heading row, cell by cell."""
    lines = README[README.index(heading) :].splitlines()[2:]
    rows = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_table_names_the_errors_that_other_tests_look_for() -> None:
    named = set(re.findall(r"`([A-Z]\w+)`", str(read_table("| the function |"))))
    assert named == {"TypeError", "SystemExit", "ProcessDied", "TimeoutError", "WorkerLost", "ValueError"}


ODD = """
import ctypes, os, time

def act(what):
    with open("runs", "a") as file:
        print(what, os.environ["OMP_NUM_THREADS"], time.time(), file=file)
    return ACTS[what]()

ACTS = {"value": str, "raise": lambda: 1 / 0, "crash": lambda: ctypes.string_at(0), "sleep": lambda: time.sleep(1000)}

with open("loads", "a") as file:
    print(os.getpid(), file=file)
"""


def test_a_retry_waits_for_its_delay_and_numpy_is_told_how_many_cpus_it_has(newcomer: Newcomer) -> None:
    (newcomer.folder / "odd.py").write_text(ODD)
    newcomer.master("--workers 1 --function odd:act --text raise sleep --timeout 0.5 --retries 1 --retry-delay 1.5", status=1)
    assert [record["attempts"] for record in newcomer.records()] == [2, 2]
    first, _, second, _ = [line.split() for line in (newcomer.folder / "runs").read_text().splitlines()]
    assert float(second[2]) - float(first[2]) >= 1.5
    assert first[1] == str(task_worker.CPUS)


def test_a_module_is_loaded_once_in_each_process_and_again_after_a_crash_or_after_so_many_tasks(newcomer: Newcomer) -> None:
    (newcomer.folder / "odd.py").write_text(ODD)
    newcomer.master("--workers 1 --function odd:act --text value crash value value value --tasks-per-process 2", status=1)
    assert len((newcomer.folder / "loads").read_text().splitlines()) == 3


@pytest.mark.usefixtures("port_5000")
@needs(not shutil.which("sha256sum"), reason="no sha256sum here")
def test_a_command_runs_for_every_file(newcomer: Newcomer) -> None:
    names = ["./plain.jpg", "./it's two words.jpg", "./two\nlines.jpg"]
    for name in names:
        (newcomer.folder / name).write_text("")
    newcomer.run(find_block("command"))
    records = newcomer.records("sums.jsonl")
    assert sorted(record["task"] for record in records) == sorted(names)
    for record in records:
        assert "e3b0c44298fc1c149afbf4c8996fb924" in record["result"]["stdout"]
        assert list(record["result"]) == ["exit", "stdout", "stderr"]


@pytest.mark.usefixtures("port_5000")
def test_a_command_gets_the_members_of_a_task(newcomer: Newcomer) -> None:
    make_script(newcomer.bin / "convert", 'printf "%s\\n" "$@"')  # no picture is needed to see what it is told
    newcomer.run(find_block("members"))
    (record,) = newcomer.records("small.jsonl")
    assert record["result"]["stdout"].splitlines() == ["a picture.jpg", "-resize", "200", "small-0.jpg"]


def test_the_farm_in_python_prints_results_and_errors(newcomer: Newcomer) -> None:
    newcomer.write("farm.py")
    program = newcomer.run("python3 farm.py")
    assert sorted(program.stdout) == ["-9 ValueError", "1 1.0", "4 2.0"]
    assert "Traceback" not in "\n".join(program.stderr)
    assert (newcomer.home / ".task_authkey").stat().st_mode & 0o077 == 0


@needs(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_the_farm_in_python_passes_mypy(newcomer: Newcomer) -> None:
    newcomer.write("farm.py")
    newcomer.run("python3 -m mypy --strict --python-version 3.13 farm.py")


def names_in(heading: str) -> list[str]:
    """The names in the first column of a table."""
    return re.findall(r"`(\w+)`", " ".join(row[0] for row in read_table(heading)))


def test_the_module_offers_three_names_whose_arguments_and_members_are_in_the_tables() -> None:
    arguments = [*inspect.signature(task_master.TaskMaster).parameters]
    assert sorted(names_in("| argument of `TaskMaster` |")) == sorted(arguments)
    assert sorted(names_in("| `Record` |")) == sorted([*task_master.Record._fields, "ok"])
    assert sorted(task_master.__all__) == ["Failure", "Record", "TaskMaster"]


@pytest.mark.usefixtures("port_5000")
def test_a_plain_client_takes_part(newcomer: Newcomer) -> None:
    newcomer.write("client.py")
    master = newcomer.bash("exec python3 task_master.py 3 4")
    master.wait_line("listening on")
    assert newcomer.run("python3 client.py").stdout == ["no more tasks"]
    assert master.wait() == 0
    assert sorted(master.stdout[-2:]) == ["Result: 3 * 3 = 9", "Result: 4 * 4 = 16"]


@pytest.fixture(params=[0, 2], ids=["all well", "two failed"])
def failing(request: pytest.FixtureRequest, newcomer: Newcomer) -> int:
    """How many of three thousand records of a real job have failed; as if a/1, b/2 and, after a pause, c/3 had worked in turn."""
    count = int(request.param)
    (newcomer.folder / "check.py").write_text(f"def f(n):\n    assert n % 1000 != 500 or n >= 1000 * {count}\n    return n\n")
    newcomer.run("seq 0 2999 >tasks")
    newcomer.master("--tasks tasks --ordered --workers 1 --function check:f", status=1 if count else 0)
    records = newcomer.records()
    for record in records:
        turn, second = divmod(record["id"], 1000)
        record.update(worker=("a/1", "b/2", "c/3")[turn], started_at=1.8e9 + 100 * (turn + (turn > 1)) + second / 10, seconds=0.1)
    records.append({**records[0], "id": 3000, "started_at": None, "seconds": None, "worker": ""})  # never started
    (newcomer.folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return count


@needs(not shutil.which("jq"), reason="no jq here")
def test_jq_shows_which_tasks_failed(newcomer: Newcomer, failing: int) -> None:
    failed = [json.loads(line) for line in newcomer.run(find_block("jq")).stdout]
    assert failed == [[500 + 1000 * number, "AssertionError", ""] for number in range(failing)]


@needs(not importlib.util.find_spec("pandas"), reason="pandas is not installed")
def test_pandas_counts_failures_by_type_and_time_by_host(newcomer: Newcomer, failing: int) -> None:
    newcomer.write("times.py")
    lines = [line.split() for line in newcomer.run("python3 times.py results.jsonl").stdout]
    assert (["AssertionError", str(failing)] in lines) == bool(failing)
    (row,) = [line for line in lines if line[:1] == ["b"]]
    assert [float(cell) for cell in row[1:]] == pytest.approx([1000, 100, 0.1, 0.1])


@needs_matplotlib
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries about each other
def test_pictures_show_who_worked_when_and_what_failed(newcomer: Newcomer, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(newcomer.folder)
    monkeypatch.setattr(sys, "argv", ["look.py", "results.jsonl", "picture.png"])
    top, bottom = runpy.run_path(str(newcomer.write("look.py")))["figure"].axes
    assert (newcomer.folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    (image,) = top.images
    pixels = (image.to_rgba(image.get_array())[:, :, :3] * 255).round()
    blue, red = [(abs(pixels - color) < 2).all(axis=2) for color in ((31, 119, 180), (214, 39, 40))]
    done, failed = [patch.get_data() for patch in bottom.patches]
    right = 1.002 * done.edges[-1]
    assert [*image.get_extent()] == pytest.approx([0, right, 9, 0]) and top.get_xlim() == bottom.get_xlim()
    assert [(tick.get_position()[1], tick.get_text()) for tick in top.get_yticklabels()] == [(1, "a/1"), (4, "b/2"), (7, "c/3")]
    lanes = [blue[:, round(second / right * blue.shape[1])].nonzero()[0].tolist() for second in (50, 150, 250, 350)]
    assert lanes == [[0], [3], [], [6]]  # one below the other, and each alone at its time
    assert red.any(axis=1).nonzero()[0].tolist() == [1, 4][:failing]  # below the lanes of a/1 and b/2
    heights = [done.values[done.edges.searchsorted(second)] for second in (50, 150, 250, 350)]
    assert heights == pytest.approx([10, 10, 0, 10], rel=0.1)  # tasks a second
    assert failed.values.any() == bool(failing)
    assert [patch.get_facecolor() for patch in bottom.patches] == [image.cmap(1), image.cmap(2)]


@needs_matplotlib
def test_a_picture_of_nothing_is_refused_in_one_line(newcomer: Newcomer) -> None:
    newcomer.write("look.py")
    (newcomer.folder / "results.jsonl").write_text("")
    assert newcomer.run("python3 look.py results.jsonl picture.png", 1).stderr == ["results.jsonl has no task that was started"]


CUBE = """
import os, time

def cube(n):
    time.sleep(0.01)
    while n != "a string" and n > 300 and not os.path.exists("go"):
        time.sleep(0.01)
    return n ** 3
"""
ON_DASK = "exec python3 on_dask.py cubes:cube tasks results.jsonl"
WITHOUT_DASK = "exec python3 task_master.py --port 0 --tasks tasks --results results.jsonl --workers 2 --function cubes:cube"


@needs(not importlib.util.find_spec("distributed"), reason="dask.distributed is not installed")
@pytest.mark.parametrize("commands", [(ON_DASK, WITHOUT_DASK + " --resume"), (WITHOUT_DASK, ON_DASK)], ids=["back", "there"])
def test_a_job_that_was_killed_is_carried_on_with_dask_or_without(newcomer: Newcomer, commands: tuple[str, str]) -> None:
    newcomer.write("on_dask.py")
    (newcomer.folder / "cubes.py").write_text(CUBE)
    newcomer.run("seq 0 699 >tasks; echo '\"a string\"' >>tasks")
    results = newcomer.folder / "results.jsonl"
    first = newcomer.bash(commands[0])
    wait_until(lambda: results.exists() and results.read_bytes().count(b"\n") > 50, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    begun = results.read_text().count("\n")
    (newcomer.folder / "go").touch()
    with results.open("a") as file:
        file.write('{"id": 7, "ta')  # as a kill may leave it, or a power cut
    second = newcomer.bash(commands[1])
    assert second.wait() == (0 if "on_dask" in commands[1] else 1), second.lines
    records = newcomer.records()
    assert sorted(record["id"] for record in records) == [*range(701)]
    assert 50 < begun < 700
    (failed,) = [record for record in records if "error" in record]
    assert (failed["task"], failed["error"]["type"]) == ("a string", "TypeError")
    assert all(record["result"] == record["task"] ** 3 for record in records if record is not failed)
    assert len({tuple(record) for record in records}) == 2  # the same members from both


@needs(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_service(newcomer: Newcomer) -> None:
    text = find_block("service").replace("/usr/bin/python3", sys.executable)
    (newcomer.folder / "task-worker.service").write_text(text)
    checked = newcomer.bash("systemd-analyze verify ./task-worker.service 2>&1")
    assert (checked.wait(), [line for line in checked.stdout if "task-worker.service" in line]) == (0, []), checked.lines


def test_the_service_starts_the_worker_with_options_that_it_has_and_never_hits_a_limit() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.read_string(find_block("service"))
    program, file, *argv = shlex.split(unit["Service"]["ExecStart"])
    assert (program, file) == ("/usr/bin/python3", "task_worker.py")
    options = task_worker.make_parser().parse_args(argv)
    assert (options.wait, options.host, options.function) == (0, "thishost", "words:count")
    assert unit["Service"]["WorkingDirectory"].startswith("/")
    assert (unit["Unit"]["StartLimitIntervalSec"], unit["Service"]["RestartSec"]) == ("0", "30")


def test_a_service_whose_key_or_module_is_wrong_exits_at_once(newcomer: Newcomer) -> None:
    (newcomer.folder / "words.py").write_text("import no_such_library\n")
    master = newcomer.bash("exec python3 task_master.py --port 0 --function words:count 1")
    command = f"python3 task_worker.py --port {master.port()} --wait 0 --function words:count"
    assert "no_such_library" in newcomer.run(command, status=2).stderr[-1]
    newcomer.write("words.py")
    (newcomer.home / ".task_authkey").write_text("another key of more than 16 bytes")
    assert "refused the key" in newcomer.run(command, status=3).stderr[-1]


class Post:
    """Takes every mail, or refuses all; what aiosmtpd calls a handler."""

    def __init__(self) -> None:
        self.refuses = False
        self.subjects: queue.Queue[str] = queue.Queue()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        if self.refuses:
            return "451 not now"
        headers = envelope.content.decode().splitlines()
        self.subjects.put(next(line.removeprefix("Subject: ") for line in headers if line.startswith("Subject: ")))
        return "250 OK"

    def take(self, count: int) -> list[str]:
        """The subjects of the next mails; blocks until they are there."""
        return sorted(self.subjects.get(timeout=PATIENCE) for _ in range(count))


@pytest.mark.usefixtures("port_5000")
def test_every_mail_is_sent_once_through_the_mail_queue_however_often_that_is_restarted(newcomer: Newcomer) -> None:
    post, port = Post(), free_port()
    newcomer.write("mailer.py")

    def send(subject: str) -> None:
        text = find_block("mail")
        assert text.count("Your order") == 1
        newcomer.run(text.replace("Your order", subject))

    def start() -> Program:
        program = newcomer.bash(find_block("mail queue"), SMTP_HOST="127.0.0.1", SMTP_PORT=str(port))
        program.wait_line("listening on")
        return program

    def stop(program: Program) -> None:
        """SIGTERM for the master, as a service would be stopped; `tail` ends since nobody listens."""
        (master,) = [process for process in program.descendants() if "task_master.py" in str(process.cmdline()[1:2])]
        master.send_signal(signal.SIGTERM)
        program.wait_line("stopped; to carry on:")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)  # `tail`, where it does not notice
        program.wait()

    with contextlib.ExitStack() as stack:
        controller = Controller(post, hostname="127.0.0.1", port=port)
        controller.start()
        stack.callback(controller.stop)
        send("before it runs")
        mails = start()
        assert post.take(1) == ["before it runs"]
        for subject in ("first", "second", "third"):
            send(subject)
        assert post.take(3) == ["first", "second", "third"]
        post.refuses = True
        send("refused at first")
        mails.wait_line("task 4 failed: SMTP.*451")
        stop(mails)
        post.refuses = False
        send("while it is stopped")
        mails = start()
        assert post.take(2) == ["refused at first", "while it is stopped"]
        stop(mails)
    assert post.subjects.empty()
    records = newcomer.records("sent.jsonl")
    assert sorted(record["id"] for record in records) == [*range(6)]
    assert {record["result"] for record in records} == {"sent"}


@needs_sshd
@pytest.mark.usefixtures("port_5000")
def test_one_command_starts_workers_on_two_hosts_and_leaves_nothing_there(newcomer: Newcomer, farm: Farm) -> None:
    net = SshNet(farm)
    hosts = [net.host(name) for name in ("host1", "host2")]
    master = newcomer.bash(f"exec {find_block('hosts').strip()} --tasks -", stdin=subprocess.PIPE)
    master.wait_line(r"worker host[12]/\d+ connected", count=2)
    master.give([2, 3])
    assert master.wait() == 0, master.lines
    assert sorted(master.stdout[-2:]) == ["Result: 2 * 2 = 4", "Result: 3 * 3 = 9"]
    assert master.said("host host2: [1-4] process")  # the last ones may have come too late
    assert master.said("^host[12]: run task 3")
    for host in hosts:
        host.check_clean()


@needs_sshd
@pytest.mark.usefixtures("port_5000")
def test_a_worker_on_another_host_is_started_with_two_commands(newcomer: Newcomer, tls_farm: Farm) -> None:
    """All hosts are this machine, the master's too."""
    folders = ["/usr/lib/openssh", "/usr/libexec/openssh", "/usr/libexec", "/usr/lib/ssh"]
    sftp = shutil.which("sftp-server", path=os.pathsep.join(folders)) or pytest.skip("no sftp-server here, as scp wants it")
    try:
        socket.getaddrinfo(socket.gethostname(), 5000)
    except OSError:
        pytest.skip("the name of this host has no address")
    newcomer.use_python(tls_farm.python)
    net = SshNet(tls_farm)
    net.host("otherhost", more=f"Subsystem sftp {sftp}", python=tls_farm.python)
    make_script(newcomer.bin / "scp", f'exec {shutil.which("scp")} -F {net.folder}/config "$@"')
    command = find_block("python3 task_master.py --host 0.0.0.0").strip()
    master = newcomer.bash(f"exec {command} --tasks -", stdin=subprocess.PIPE)
    master.wait_line("listening on .*:5000")
    text = find_block("scp task_worker.py ~/.task_authkey otherhost:")
    commands = newcomer.bash(text.replace("thishost", socket.gethostname()))
    master.wait_line(r"worker \S+ connected")
    master.give([2, 3])
    assert (master.wait(), commands.wait()) == (0, 0), (master.lines, commands.lines)
    assert sorted(master.stdout[-2:]) == ["Result: 2 * 2 = 4", "Result: 3 * 3 = 9"]
    assert commands.stdout == [f"Connect to server {socket.gethostname()}...", *commands.stdout[1:3], "worker exit."]
    assert not master.said("without TLS")


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))


def options_of(module: Any) -> set[str]:
    return options_in(module.make_parser().format_help())


@pytest.mark.parametrize(("heading", "module"), [("| master | |", task_master), ("| worker | |", task_worker)])
def test_the_table_has_the_options_of_the_help(heading: str, module: Any) -> None:
    shown = options_in(" ".join(row[0] for row in read_table(heading)))
    assert shown == options_of(module) - {"--help", "--version"}


def test_every_option_that_is_named_is_one_of_the_two_programs() -> None:
    others = {"--now", "--strict", "--quiet", "--editable"}  # of systemctl, mypy and pip
    others |= {"--nodes", "--ntasks-per-node", "--exclusive", "--time", "--signal", "--requeue", "--open-mode"}  # of sbatch
    others |= {"--cpus-per-task", "--kill-on-bad-exit"}  # of srun
    assert options_in(README) - options_of(task_master) - options_of(task_worker) <= others


@pytest.mark.parametrize(
    ("statement", "figure"),
    [
        ("(1 MiB of each is", task_worker.OUTPUT_LIMIT / (1 << 20)),
        ("have room for 60 MiB", task_worker.TEXT_LIMIT / (1 << 20)),
        ("up to 20 MiB", task_master.PACK_LIMIT / (1 << 20)),
        ("waits 60 s for its master", task_worker.make_parser().get_default("wait")),
        ("(127.0.0.1, 5000;", task_worker.make_parser().get_default("port")),
        ("(default 2)", task_master.make_parser().get_default("redeliveries")),
        ("of which 256 at a time", task_master.PENDING_LIMIT),
        ("get 10 s each to prove", task_worker.HANDSHAKE_LIMIT),
        ("at most 10,000 at a time", task_master.LEASE_LIMIT),
        ("send messages over 1 MiB, one at a time", task_master.LARGE / (1 << 20)),
    ],
)
def test_a_figure_in_the_text_is_that_of_the_code(statement: str, figure: float) -> None:
    assert statement in " ".join(README.split())
    assert float(re.findall(r"\d+", statement.replace(",", "").replace("127.0.0.1", ""))[0]) == figure


def test_a_silent_peer_is_noticed_in_the_time_that_is_promised() -> None:
    assert "within 60 s. A long task does not count as silence" in " ".join(README.split())
    assert task_worker.SILENCE_LIMIT < 60


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in README.splitlines() if line[:1] == "#"
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) - headings == set()


@pytest.mark.parametrize(
    ("column", "statuses"), [(1, [0, 1, 2, 3, 129, 130, 143]), (2, [0, 2, 3, 129, 130, 143])], ids=["master", "worker"]
)
def test_the_table_has_the_exit_statuses_that_other_tests_look_for(column: int, statuses: list[int]) -> None:
    rows = [row for row in read_table("| exit status |") if row[column:] and row[column]]
    assert [int(number) for row in rows for number in row[0].split(", ")] == statuses


def test_the_test_command_is_that_of_continuous_integration() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("this copy has no .ci folder")
    assert find_block("python3 -m venv .venv").strip() in script.read_text().splitlines()

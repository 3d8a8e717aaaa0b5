"""Every block of the README is run as it stands there, and what it states of options, figures and statuses is compared."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import json
import os
import queue
import re
import shlex
import shutil
import signal
import smtplib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiosmtpd.controller import Controller
from conftest import PATIENCE, ROOT, Farm, Program

import task_master
import task_worker

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:<!-- test: (?P<name>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
# By the name in the comment before the block, else by its first line; there is one unit for systemd
BLOCKS = {
    match["name"] or ("service" if match["language"] == "ini" else match["text"].split("\n")[0]): match["text"]
    for match in BLOCK.finditer(README)
}
BLOCKS_THAT_A_TEST_RUNS = {
    "$ python3 task_master.py",
    "$ python3 task_worker.py",
    "python3 task_master.py --workers 2",
    "# words.py",
    "find . -name '*.md' | python3 task_master.py --tasks - --text --results counts.jsonl --workers 2 --function words:count",
    '{"id": 0, "task": "./README.md", "result": 2217, "seconds": 0.000213, "worker": "myhost/4711", "attempts": 1}',
    "farm.py",
    "scp task_worker.py ~/.task_authkey otherhost:",
    "service",
    "mailer.py",
    "mail queue",
    "mail",
    "command",
    "ssh",
    "outgrow.py",
    "python3 -m venv .venv && .venv/bin/python -m pip install --quiet --editable '.[test]' && .venv/bin/python -m pytest",
}


def find_block(start: str) -> str:
    """The block with this name, or the one whose first line begins so."""
    found = [text for key, text in BLOCKS.items() if key == start or (start not in BLOCKS and key.startswith(start))]
    assert len(found) == 1, f"{len(found)} blocks for {start!r} in the README"
    return found[0]


def make_script(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


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
        make_script(self.bin / "python3", f'exec {shlex.quote(sys.executable)} "$@"\n')

    def env(self, **more: str) -> dict[str, str]:
        env = self._farm.env(PATH=f"{self.bin}{os.pathsep}{os.environ['PATH']}", **more)
        del env["TASK_AUTHKEY"]
        return env

    def write(self, name: str, block: str | None = None) -> None:
        """Save a block under a name."""
        (self.folder / name).write_text(find_block(block or name))

    def bash(self, text: str, stdin: Any = None, **env: str) -> Program:
        """Start a block, or any command."""
        options = {} if stdin is None else {"stdin": stdin}
        program = Program(["bash", "-c", text], self.folder, self.env(**env), **options)
        self._farm.programs.append(program)
        return program

    def records(self, name: str) -> list[dict[str, Any]]:
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# ---- every block ---------------------------------------------------------------------------------------------------


def test_no_block_is_without_a_test() -> None:
    assert set(BLOCKS) == BLOCKS_THAT_A_TEST_RUNS
    assert README.count("\n```") == 2 * len(BLOCKS), "a block has no language, or there are two with the same first line"


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
    master = newcomer.bash(find_block("python3 task_master.py --workers 2"))
    assert master.wait() == 0
    assert len([line for line in master.stdout if re.fullmatch(r"Result: (\d+) \* \1 = \d+", line)]) == 10


@pytest.mark.usefixtures("port_5000")
def test_words_are_counted_and_the_record_has_the_members_shown(newcomer: Newcomer) -> None:
    newcomer.write("words.py", "# words.py")
    (newcomer.folder / "README.md").write_text("three words here")
    assert newcomer.bash(find_block("find . -name '*.md'")).wait() == 0
    (record,) = newcomer.records("counts.jsonl")
    assert (record["task"], record["result"]) == ("./README.md", 3)
    assert list(record) == list(json.loads(find_block('{"id": 0')))


def test_the_farm_in_python_prints_results_and_errors(newcomer: Newcomer) -> None:
    newcomer.write("farm.py")
    program = newcomer.bash("python3 farm.py")
    assert program.wait() == 0
    assert sorted(program.stdout)[1:] == ["1 1.0", "4 2.0"]
    assert re.fullmatch("-9 .+", min(program.stdout))  # what math says differs between Pythons
    assert "Traceback" not in "\n".join(program.stderr)


@pytest.mark.usefixtures("port_5000")
def test_a_command_runs_for_every_file(newcomer: Newcomer) -> None:
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    names = ["./plain.jpg", "./it's two words.jpg"]
    for name in names:
        (newcomer.folder / name).write_text("")
    assert newcomer.bash(find_block("command")).wait() == 0
    records = newcomer.records("sums.jsonl")
    assert sorted(record["task"] for record in records) == sorted(names)
    for record in records:
        assert record["result"]["stdout"].startswith("e3b0c44298fc1c149afbf4c8996fb924")
        assert list(record["result"]) == ["exit", "stdout", "stderr"]


def test_the_service_starts_the_worker_with_options_that_it_has() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(find_block("service"))
    program, file, *argv = shlex.split(unit["Service"]["ExecStart"])
    assert (program, file) == ("/usr/bin/python3", "task_worker.py")
    options = task_worker.make_parser().parse_args(argv)
    assert (options.wait, options.host, options.function) == (0, "thishost", "words:count")
    assert unit["Service"]["WorkingDirectory"].startswith("/")


def test_dask_runs_the_same_function(newcomer: Newcomer) -> None:
    if not importlib.util.find_spec("distributed"):
        pytest.skip("dask.distributed is not installed")
    newcomer.write("outgrow.py")
    program = newcomer.bash("python3 outgrow.py")
    assert program.wait() == 0, program.stderr
    assert program.stdout == ["1.0", "2.0", "3.0"]


def test_the_test_command_is_that_of_continuous_integration() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("this copy has no .ci folder")
    assert find_block("python3 -m venv .venv").strip() in script.read_text().splitlines()


# ---- the mail queue ------------------------------------------------------------------------------------------------


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


class MailQueue:
    """The queue of the recipe, and those who send mails through it."""

    def __init__(self, newcomer: Newcomer, port: int) -> None:
        self._newcomer, self._port = newcomer, port
        newcomer.write("mailer.py")

    def start(self) -> None:
        self.program = self._newcomer.bash(find_block("mail queue"), SMTP_HOST="127.0.0.1", SMTP_PORT=str(self._port))
        self.program.wait_line("listening on")

    def send(self, subject: str) -> None:
        text = find_block("mail")
        assert text.count("Your order") == 1
        assert self._newcomer.bash(text.replace("Your order", subject)).wait() == 0

    def stop(self) -> None:
        """SIGTERM for the master, as a service would be stopped; `tail` ends since nobody listens."""
        processes = psutil.Process(self.program.pid).children(recursive=True)
        (master,) = [process for process in processes if any("task_master.py" in word for word in process.cmdline())]
        master.send_signal(signal.SIGTERM)
        self.program.wait_line("stopped; to carry on:")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.program.pid, signal.SIGKILL)  # `tail`, where it does not notice
        self.program.wait()


@pytest.fixture
def post() -> Iterator[tuple[Post, int]]:
    """A real SMTP server, and its port."""
    post, port = Post(), free_port()
    controller = Controller(post, hostname="127.0.0.1", port=port)
    controller.start()
    yield post, port
    controller.stop()


@pytest.mark.usefixtures("port_5000")
def test_every_mail_is_sent_once_through_the_mail_queue(newcomer: Newcomer, post: tuple[Post, int]) -> None:
    handler, port = post
    mails = MailQueue(newcomer, port)
    mails.send("before it runs")
    mails.start()
    assert handler.take(1) == ["before it runs"]
    for subject in ("first", "second", "third"):
        mails.send(subject)
    assert handler.take(3) == ["first", "second", "third"]
    mails.stop()
    mails.send("while it is stopped")
    mails.start()
    mails.send("last")
    assert handler.take(2) == ["last", "while it is stopped"]
    mails.stop()
    assert handler.subjects.empty()
    records = newcomer.records("sent.jsonl")
    assert sorted(record["id"] for record in records) == [0, 1, 2, 3, 4, 5]
    assert {record["result"] for record in records} == {"sent"}


@pytest.mark.usefixtures("port_5000")
def test_a_mail_that_failed_is_tried_again_when_the_mail_queue_is_restarted(newcomer: Newcomer, post: tuple[Post, int]) -> None:
    handler, port = post
    handler.refuses = True
    mails = MailQueue(newcomer, port)
    mails.start()
    mails.send("again")
    mails.program.wait_line("task 0 failed: SMTP.*451")
    mails.stop()
    handler.refuses = False
    mails.start()
    assert handler.take(1) == ["again"]
    mails.stop()
    assert [record["result"] for record in newcomer.records("sent.jsonl")] == ["sent"]


def test_a_mail_that_cannot_be_sent_is_an_error(newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    newcomer.write("mailer.py")
    module: dict[str, Any] = {}
    exec((newcomer.folder / "mailer.py").read_text(), module)
    monkeypatch.setenv("SMTP_PORT", str(free_port()))
    monkeypatch.setenv("SMTP_HOST", "127.0.0.1")
    with pytest.raises((OSError, smtplib.SMTPException)):
        module["send"]({"to": "you@example.org", "subject": "", "text": ""})


# ---- workers over SSH ----------------------------------------------------------------------------------------------

SSHD_CONFIG = """
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp {sftp}
"""
# Each "host" has a home of its own, though both are this machine
SSHD_HOST = """
Match LocalPort {port}
    ForceCommand cd {home} && export HOME={home} PATH={bin}:"$PATH" && eval "$SSH_ORIGINAL_COMMAND"
"""
SSH_CONFIG = """
Host *
    HostName 127.0.0.1
    HostKeyAlias test
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
    LogLevel ERROR
"""
# Both hosts are this machine: where they would have the same port 5001 each takes one of its own, and the master is here
SSH_WRAPPER = """
case " $* " in {cases} esac
for argument; do
    shift
    set -- "$@" "$(printf %s "$argument" | sed "s/5001/$tunnel/; s/^thishost$/127.0.0.1/")"
done
exec {ssh} -F {config} "$@"
"""


class SshHosts:
    """An sshd with a port for each of the host names, and `ssh` and `scp` on the newcomer's PATH that find them."""

    def __init__(self, newcomer: Newcomer, sshd: str, names: list[str]) -> None:
        self.folder = newcomer.folder.parent / "ssh"
        self.folder.mkdir(mode=0o700)
        self.homes = {name: self.folder / name for name in names}
        ports = {name: free_port() for name in names}
        for key in ("host_key", "user_key"):
            self._run(newcomer, f"ssh-keygen -q -t ed25519 -N '' -f {self.folder / key}")
        self._write("known_hosts", "test " + (self.folder / "host_key.pub").read_text())
        self._configure_server(newcomer, ports)
        self._configure_client(newcomer, ports)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # an empty folder that it wants, made by its service
        self.server = Program([sshd, "-D", "-e", "-f", str(self.folder / "sshd_config")], self.folder, newcomer.env())
        self.server.wait_line("Server listening", count=len(names))

    def _run(self, newcomer: Newcomer, command: str) -> None:
        program = newcomer.bash(command)
        assert program.wait() == 0, program.stderr

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _configure_server(self, newcomer: Newcomer, ports: dict[str, int]) -> None:
        folders = ["/usr/lib/openssh", "/usr/libexec/openssh", "/usr/libexec", "/usr/lib/ssh"]
        sftp = shutil.which("sftp-server", path=os.pathsep.join(folders)) or pytest.skip("no sftp-server here, as scp wants it")
        text = SSHD_CONFIG.format(folder=self.folder, sftp=sftp) + "".join(f"Port {port}\n" for port in ports.values())
        for name, port in ports.items():
            self.homes[name].mkdir()
            text += SSHD_HOST.format(port=port, home=self.homes[name], bin=newcomer.bin)
        self._write("sshd_config", text)

    def _configure_client(self, newcomer: Newcomer, ports: dict[str, int]) -> None:
        hosts = "".join(f"Host {name}\n    Port {port}\n" for name, port in ports.items())
        self._write("config", hosts + SSH_CONFIG.format(folder=self.folder))
        config = self.folder / "config"
        cases = " ".join(f'*" {name} "*) tunnel={free_port()};;' for name in ports)
        make_script(newcomer.bin / "ssh", SSH_WRAPPER.format(cases=cases, ssh=shutil.which("ssh"), config=config))
        make_script(newcomer.bin / "scp", f'exec {shutil.which("scp")} -F {config} "$@"\n')

    def stop(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for session in psutil.Process(self.server.pid).children(recursive=True):
                session.kill()
        self.server.kill()
        self.server.wait()


@pytest.fixture
def ssh_hosts(newcomer: Newcomer) -> Iterator[Callable[..., SshHosts]]:
    sshd = shutil.which("sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
    if not sshd or not shutil.which("scp"):
        pytest.skip("no sshd here: install openssh-server")
    started: list[SshHosts] = []

    def start(*names: str) -> SshHosts:
        started.append(SshHosts(newcomer, sshd, list(names)))
        return started[0]

    yield start
    for hosts in started:
        hosts.stop()


def start_master_for_hosts(newcomer: Newcomer) -> tuple[Program, Callable[[str], None]]:
    """A master that is given its tasks when the workers are there; the second one gives them."""
    read_end, write_end = os.pipe()
    master = newcomer.bash("exec python3 task_master.py --tasks - --ordered", stdin=read_end)
    os.close(read_end)
    master.wait_line(r"listening on 127\.0\.0\.1:5000")

    def give(text: str) -> None:
        with open(write_end, "w") as file:
            file.write(text)

    return master, give


@pytest.mark.usefixtures("port_5000")
def test_workers_on_two_hosts_are_started_over_ssh(newcomer: Newcomer, ssh_hosts: Callable[..., SshHosts]) -> None:
    hosts = ssh_hosts("host1", "host2")
    master, give_tasks = start_master_for_hosts(newcomer)
    loop = newcomer.bash(find_block("ssh"))
    master.wait_line(r"worker \S+ connected", count=2)
    give_tasks("2\n3\n")
    assert (master.wait(), loop.wait()) == (0, 0)
    assert master.stdout[-2:] == ["Result: 2 * 2 = 4", "Result: 3 * 3 = 9"]
    loop.wait_line("worker exit.", "stdout", count=2)
    for home in hosts.homes.values():
        assert sorted(path.name for path in home.iterdir() if path.is_file()) == [".task_authkey", "task_worker.py"]
        assert (home / ".task_authkey").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("port_5000")
def test_a_worker_on_another_host_is_started_with_two_commands(newcomer: Newcomer, ssh_hosts: Callable[..., SshHosts]) -> None:
    ssh_hosts("otherhost")
    master, give_tasks = start_master_for_hosts(newcomer)
    commands = newcomer.bash(find_block("scp task_worker.py ~/.task_authkey otherhost:"))
    master.wait_line(r"worker \S+ connected")
    give_tasks("4\n")
    assert (master.wait(), commands.wait()) == (0, 0)
    assert commands.stdout == ["Connect to server 127.0.0.1...", "run task 4 * 4...", "worker exit."]


# ---- what is stated ------------------------------------------------------------------------------------------------


def read_table(heading: str) -> list[list[str]]:
    """The rows below a heading row, cell by cell."""
    lines = README[README.index(heading) :].splitlines()[2:]
    rows = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))


def options_of(module: Any) -> set[str]:
    return options_in(module.make_parser().format_help())


@pytest.mark.parametrize(("heading", "module"), [("| master | |", task_master), ("| worker | |", task_worker)])
def test_the_table_has_the_options_of_the_help(heading: str, module: Any) -> None:
    shown = options_in(" ".join(row[0] for row in read_table(heading)))
    assert shown == options_of(module) - {"--help", "--version"}


def test_every_option_that_is_named_is_one_of_the_two_programs() -> None:
    ours = README.replace(find_block("python3 -m venv .venv"), "")
    assert options_in(ours) - options_of(task_master) - options_of(task_worker) == set()


@pytest.mark.parametrize(
    ("statement", "figure"),
    [
        ("(1 MiB of each is", task_worker.OUTPUT_LIMIT / (1 << 20)),
        ("have room for 60 MiB", task_worker.TEXT_LIMIT / (1 << 20)),
        ("waits 60 s for its master", task_worker.make_parser().get_default("wait")),
        ("on port 5000", task_worker.make_parser().get_default("port")),
        ("within 60 s. A long task is no silence", task_worker.SILENCE_LIMIT),
        ("of which 256 at a time", task_master.PENDING_LIMIT),
        ("get 10 s each to prove", task_master.HANDSHAKE_LIMIT),
    ],
)
def test_a_figure_in_the_text_is_that_of_the_code(statement: str, figure: float) -> None:
    assert statement in " ".join(README.split())
    assert float(re.findall(r"\d+", statement)[0]) == figure


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in README.splitlines() if line[:1] == "#"
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) - headings == set()


def stop_master(farm: Farm, number: int) -> int:
    read_end, write_end = os.pipe()  # that nobody writes to
    master = farm.master("--tasks", "-", stdin=read_end)
    master.port()
    master.signal(number)
    status = master.wait()
    os.close(read_end)
    os.close(write_end)
    return status


def stop_worker_twice(farm: Farm, number: int) -> int:
    (farm.folder / "stay.py").write_text("import time\ndef stay(n):\n    print('it runs', flush=True)\n    time.sleep(n)\n")
    worker = farm.worker(farm.master("60"), "--function", "stay:stay")
    worker.wait_line("it runs", "stdout")
    worker.signal(number)
    worker.wait_line("draining")
    worker.signal(number)
    return worker.wait()


def finish_worker(farm: Farm) -> int:
    return farm.worker(farm.master("1")).wait()


def take_port(farm: Farm) -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return farm.run("task_master.py", "--port", server.getsockname()[1]).wait()


STATUSES: dict[str, dict[int, Callable[[Farm], int]]] = {
    "master": {
        0: lambda farm: farm.master("--workers", 1, "1").wait(),
        1: lambda farm: farm.master("--workers", 1, "--function", "functions:fail", "1").wait(),
        2: lambda farm: farm.master("--tasks", "missing").wait(),
        3: take_port,
        130: lambda farm: stop_master(farm, signal.SIGINT),
        143: lambda farm: stop_master(farm, signal.SIGTERM),
    },
    "worker": {
        0: finish_worker,
        2: lambda farm: farm.run("task_worker.py", "--function", "missing:function").wait(),
        3: lambda farm: farm.run("task_worker.py", "--port", free_port(), "--wait", 0.1).wait(),
        130: lambda farm: stop_worker_twice(farm, signal.SIGINT),
        143: lambda farm: stop_worker_twice(farm, signal.SIGTERM),
    },
}


@pytest.mark.parametrize(
    ("program", "status"), [(program, status) for program, statuses in STATUSES.items() for status in statuses]
)
def test_the_exit_status_is_that_of_the_table(farm: Farm, program: str, status: int) -> None:
    column = {"master": 1, "worker": 2}[program]
    stated = [
        int(number) for row in read_table("| exit status |") if row[column:] and row[column] for number in row[0].split(", ")
    ]
    assert stated == list(STATUSES[program])
    assert STATUSES[program][status](farm) == status

"""Workers on other hosts through the real ssh: real sshds on loopback, each with a port, keys and a home of its own.

SSH_SILENCE=1 in the environment is the long form: a host falls asleep, and is noticed with the times that are built in.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import Farm, Program, SshHost, SshNet, check_ended, check_silence, find_pythons, make_script, needs_sshd, wait_until

import task_master
from task_master import Failure, TaskMaster

pytestmark = needs_sshd
SHELLS = [shell for shell in ("bash", "dash", "tcsh", "fish", "zsh") if shutil.which(shell)]


@pytest.fixture
def net(farm: Farm) -> SshNet:
    return SshNet(farm)


def on(*hosts: str) -> list[str]:
    return [f"--ssh={host}" for host in hosts]


def start_long_tasks(net: SshNet, *argv: object, program: Any = "task_master.py") -> tuple[SshHost, Program]:
    """A master whose worker on host1 runs two long tasks."""
    host = net.host("host1")
    options = ("--port", 0, *on("2/host1"), "--function", "functions:stay")
    master = net.farm.run(program, *options, *argv, 1, 2, env=net.env())
    master.wait_line("host1: it runs", count=2)
    return host, master


def give(master: Program, tasks: Iterable[int]) -> None:
    """Put tasks into its standard input, and let it run them to the end."""
    master.give(tasks)
    assert master.wait() == 0, master.stderr


def test_any_login_shell_and_any_python_will_do_and_nothing_is_left(net: SshNet) -> None:
    hosts, arguments = [], []
    pythons = [*find_pythons().values()]
    for number in range(max(len(SHELLS), len(pythons))):
        shell = SHELLS[number % len(SHELLS)]
        hosts.append(net.host(f"{shell}{number}", shell=shell, python=None))
        arguments.append(f"1/{shell}{number}:{pythons[number % len(pythons)]}")
    options = ("--tasks", "-", "--results", "results.jsonl", "--command", 'echo {} "$HOME" "$PWD"')
    master = net.master(*on(*arguments, arguments[0]), *options, stdin=subprocess.PIPE)  # one is named twice
    master.wait_line(r"worker \S+ connected", count=len(arguments) + 1)
    give(master, range(200))
    records = net.farm.records()
    assert len(records) == 200
    homes = {str(host.home): host.name for host in hosts}
    for record in records:
        _, home, path = record["result"]["stdout"].split()
        assert record["worker"].startswith(f"{homes[home]}/")
        assert path.startswith(f"{home}/tmp/task_worker-")
    for host in hosts:
        assert master.said(f"host {host.name}: {2 if host is hosts[0] else 1} process")
        assert master.said(f"^{host.name}: worker exit.")
        host.check_clean()
    check_silence(master)


def test_what_stands_in_the_home_there_is_not_used_and_a_python_below_it_can_be_named(net: SshNet) -> None:
    host = net.host("host1", python=None)
    for name in ("task_worker", "functions", "signal", "queue", "tempfile", "zipfile"):
        (host.home / f"{name}.py").write_text("raise SystemExit('an old one')\n")
    (host.home / "venv").mkdir()
    (host.home / "venv" / "python").symlink_to(os.path.realpath(sys.executable))
    options = ("--tasks", "-", "--results", "results.jsonl", "--function", "functions:double")
    master = net.master(*on("1/host1:~/venv/python", "1/host1:venv/python"), *options, stdin=subprocess.PIPE)
    master.wait_line("worker host1/.* connected", count=2)
    give(master, range(100))
    net.farm.check_doubled(100)
    assert not master.said("relative paths")


def test_the_key_is_in_no_argument_and_no_file_and_nothing_is_left_when_the_master_is_killed(net: SshNet) -> None:
    host, master = start_long_tasks(net)
    words = str([process.cmdline() for process in [*host.processes(), *master.descendants()]])
    assert "task_worker.py" in words
    assert net.farm.key not in words
    (folder,) = host.tmp.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not [path for path in folder.rglob("*") if path.is_file() and net.farm.key.encode() in path.read_bytes()]
    ssh = master.descendants()
    master.kill()
    host.check_clean()
    check_ended(ssh)


def test_options_for_workers_reach_the_host_and_tls_goes_through_the_tunnel(farm: Farm) -> None:
    net = SshNet(farm.use_tls())
    net.host("host1", python=farm.python)
    options = ("--command", 'echo {} "$PPID"; : >"$TASK_ID"', "--tasks-per-process", 1, "--quiet", "--results", "results.jsonl")
    master = net.master(*on("1/host1"), *options, 1, 2)
    assert master.wait() == 0, master.stderr
    outputs = [record["result"]["stdout"].split() for record in farm.records()]
    assert [task for task, _ in outputs] == ["1", "2"]
    assert outputs[0][1] != outputs[1][1]
    assert not master.said("Connect to server|worker exit")
    assert master.said("^host1: task_worker: tasks wrote to relative paths, which are removed: 0 1$")


def write_package(farm: Farm) -> None:
    """A package of 19 MiB with a program, and with what must not travel."""
    package = farm.folder / "pkg"
    for name in ("inner", "__pycache__", ".git", "data"):
        (package / name).mkdir(parents=True)
    for name in ("__init__.py", "__pycache__/x.pyc", ".git/config", "inner/__init__.py", "data/__init__.py", "../outside.py"):
        (package / name).touch()
    (package / "data" / "words").write_bytes(os.urandom(19 << 20))
    (package / "data" / "loop").symlink_to(farm.folder, target_is_directory=True)
    make_script(package / "data" / "hi", "echo hi")
    (package / "inner" / "deep.py").write_text(
        "import pathlib, subprocess\nfrom .. import data\n"
        "def look(task):\n"
        "    top = pathlib.Path(__file__).parents[2]\n"
        "    subprocess.run([top / 'pkg/data/hi'], check=True)\n"
        "    paths = [path for path in top.rglob('*') if path.is_file() and path.suffix != '.pyc']\n"
        "    return {str(path.relative_to(top)): path.stat().st_size for path in paths}\n"
    )


def test_a_package_travels_with_its_programs_and_nothing_else_does_and_one_above_20_mib_is_refused(net: SshNet) -> None:
    net.host("host1")
    write_package(net.farm)
    master = net.master(*on("1/host1"), "--function", "pkg.inner.deep:look", "--results", "results.jsonl", 1)
    assert master.wait() == 0, master.stderr
    (record,) = net.farm.records()
    names = ["__init__.py", "data/__init__.py", "data/hi", "data/words", "inner/__init__.py", "inner/deep.py"]
    assert sorted(record["result"]) == [*[f"pkg/{name}" for name in names], "task_worker.py"]
    assert record["result"]["pkg/data/words"] == 19 << 20
    (net.farm.folder / "pkg" / "more").write_bytes(bytes(1 << 20))
    master = net.master(*on("host1"), "--function", "pkg.inner.deep:look", 1)
    assert master.wait() == 2
    said = f"--function pkg.inner.deep:look: {net.farm.folder}/pkg has more than 20 MiB, too much for --ssh"
    assert master.stderr == [f"task_master: {said}"]
    (net.farm.folder / "pkg" / "more").rename(net.farm.folder / "pkg" / os.fsdecode(b"\xff"))
    (net.farm.folder / "pkg" / "data" / "words").unlink()
    master = net.master(*on("host1"), "--function", "pkg.inner.deep:look", 1)
    assert master.wait() == 2
    assert re.match("task_master: --function pkg.inner.deep:look: cannot pack .*/pkg for --ssh", *master.stderr)


def test_a_folder_with_the_name_of_the_module_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    for name in ("words.py", "words/data"):
        (tmp_path / name).touch()
    with zipfile.ZipFile(io.BytesIO(task_master.pack_files("words:count"))) as archive:
        assert sorted(archive.namelist()) == ["task_worker.py", "words.py"]


def test_hosts_that_cannot_work_are_given_up_with_the_reason(net: SshNet) -> None:
    farm = net.farm
    old = [*Path("~/.pyenv/versions").expanduser().glob("[23].[678].*/bin/python")]
    here = "{}.{}".format(*sys.version_info)
    needs = f"import sys\nif sys.version_info[:2] != {sys.version_info[:2]}:\n    import nosuch\n"
    farm.write("needy.py", f"{needs}def double(n):\n    return 2 * n\n")
    other = [python for version, python in find_pythons().items() if version != here]
    expected = {
        "nosuch": "Could not resolve hostname nosuch.invalid: ",
        "nokey": r"\S+@127.0.0.1: Permission denied \(publickey",
        "changed": "Host key for changed has changed and you have requested strict checking",
        "unknown": "Host key verification failed",
        "1/nopython:nopython3": r".*nopython3.*not found \(try: ssh nopython nopython3\)",
        "closed": "Error: remote port forwarding failed for listen port 0",
        **{f"old{n}:{path}": r"Python [\d.]+ is too old there: 3.9 or newer is needed" for n, path in enumerate(old)},
        **{f"1/needy:{path}": "its worker ended with exit status 2, see above" for path in other[:1]},
    }
    names = [re.sub("^1/|:.*", "", text) for text in expected]
    net.configure("nosuch", "HostName nosuch.invalid")
    hosts = {name: net.host(name) for name in {"needy", *names} - {"nosuch", "closed"}}
    net.host("closed", more="AllowTcpForwarding no")
    (hosts["nokey"].folder / "authorized_keys").write_text("")
    known, keys = net.folder / "known_hosts", [hosts[name].folder / "host_key.pub" for name in ("changed", "unknown")]
    changed, unknown = [key.read_text().split()[1] for key in keys]
    lines = known.read_text().replace(changed, unknown).splitlines()
    known.write_text("\n".join(line for line in lines if not line.startswith("unknown ")) + "\n")
    net.host("good")
    full = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(net.host("full").tmp)]
    if subprocess.run(full, capture_output=True, check=False).returncode == 0:  # else it cannot be had here
        farm.closing(types.SimpleNamespace(close=lambda: subprocess.run(["umount", "-l", full[-1]], check=True)))
        expected["full"] = r"OSError: .*No space left on device.* \(try: ssh full python3\)"
        names.append("full")
    options = ("--tasks", "-", "--results", "results.jsonl", "--function", "needy:double")
    master = net.master(*on("1/good", *expected), *options, stdin=subprocess.PIPE)
    for name, reason in zip(names, expected.values()):
        master.wait_line(f"^task_master: {name}: {reason}.*; given up$")
    if other:
        assert master.said("^needy: task_worker: --function needy:double: .* No module named 'nosuch' .*what --ssh sends")
    give(master, range(10))
    farm.check_doubled(10)
    for host in net.hosts:
        host.check_clean()
    for name in names:
        assert len(master.said(f"^(task_master: )?{name}: ")) == 1 or name == "needy"
    check_silence(master)


def test_a_host_that_is_down_is_tried_until_it_is_up_and_the_job_stops_when_the_last_worker_leaves(net: SshNet) -> None:
    bad, host = [net.host(name) for name in ("bad", "host1")]
    host.stop()
    (bad.folder / "authorized_keys").write_text("")
    master = net.master(*on("bad", "host1"), "--tasks", "-", "--results", "results.jsonl", stdin=subprocess.PIPE)
    worker = net.farm.worker(master)
    master.wait_line(r"worker \S+ connected")
    master.wait_line("bad: .*Permission denied.*; given up")
    master.wait_line(r"host1: connect to host 127.0.0.1 port \d+: Connection refused .*; trying again")
    (host.folder / "authorized_keys").write_text("")
    host.start()
    master.wait_line("host1: .*Permission denied.*; given up")
    master.put("3\n")
    net.farm.wait_records(master, 1)
    worker.signal(signal.SIGTERM)
    assert (worker.wait(), master.wait()) == (0, 1)
    assert master.said(r"stopped; to carry on: .* --resume .* --results results.jsonl \(with the same input\)$")
    assert re.search("no worker is left .bad: .*denied.*; host1: .*denied", master.stderr[-1])
    assert len(master.said("refused")) == 1


@pytest.mark.early
@pytest.mark.parametrize(
    "reason", ["Could not resolve hostname host1: Name or service not known", "root@host1: Permission denied (x)."]
)
def test_a_connection_that_was_cut_comes_back_though_the_host_cannot_be_reached_for_a_while(farm: Farm, reason: str) -> None:
    net = SshNet(farm)
    _, _, rest = (net.bin / "ssh").read_text().partition("\n")
    make_script(net.bin / "ssh", f'[ ! -e gone ] || {{ echo "ssh: {reason}" >&2; exit 255; }}\n{rest}')
    host, master = start_long_tasks(net)
    before = host.processes()
    (farm.folder / "gone").touch()
    for session in host.sessions():
        session.kill()
    master.wait_line(r"host1: the connection was lost; trying again")
    check_ended(before)
    master.wait_line(f"host1: {re.escape(reason)}.*; trying again")
    (farm.folder / "gone").unlink()
    master.wait_line("host1: it runs", count=4)
    for ssh in master.descendants():
        ssh.kill()
    master.wait_line(r"host1: the connection was lost; trying again", count=2)
    master.wait_line("host1: it runs", count=6)
    wait_until(lambda: len([*host.tmp.iterdir()]) == 1)


@pytest.mark.early
def test_a_host_that_falls_asleep_is_noticed_and_comes_back(farm: Farm) -> None:
    silence = "SSH_SILENCE" in os.environ
    net = SshNet(farm, *[] if silence else ["-o ServerAliveInterval=5"])
    host, master = start_long_tasks(net)
    before, asleep = host.processes(), host.sessions()
    for session in asleep:
        session.suspend()
    master.wait_line(r"host1: the connection was lost; trying again", timeout=100)
    master.wait_line("host1: it runs", count=4)
    if silence:
        check_ended(before)
    for session in asleep:
        session.resume()
    check_ended(before)
    wait_until(lambda: len([*host.tmp.iterdir()]) == 1)


@pytest.mark.early
def test_a_worker_that_hears_nothing_of_its_master_leaves_and_is_started_again(farm: Farm) -> None:
    patched = farm.make_patched(SILENCE_LIMIT=8.0, BEAT_INTERVAL=1.0) / "task_master.py"
    host, master = start_long_tasks(SshNet(farm), program=patched)
    before = host.processes()
    master.pause(9)
    assert all(process.is_running() for process in before)
    master.signal(signal.SIGSTOP)
    host.check_clean()
    master.signal(signal.SIGCONT)
    master.wait_line("host1: it runs", count=4)
    assert master.said("host1: the connection was lost; trying again")


def find_bootstrap(host: SshHost) -> psutil.Process:
    (found,) = [process for process in host.processes() if process.cmdline()[-1].startswith("import sys;")]
    return found


def test_a_worker_that_was_killed_is_replaced_and_one_that_was_told_to_leave_is_not(net: SshNet) -> None:
    host, master = start_long_tasks(net, 0)
    (worker,) = find_bootstrap(host).children()
    worker.kill()
    master.wait_line(r"host1: its worker ended with exit status 137, see above; trying again")
    master.wait_line("host1: it runs", count=4)
    wait_until(lambda: len([*host.tmp.iterdir()]) == 1)
    find_bootstrap(host).terminate()
    master.wait_line("host1: task_worker: draining")
    (folder,) = host.tmp.iterdir()
    (folder / "go").touch()
    assert master.wait() == 1
    assert master.said("host1: its worker ended with exit status 0, see above; given up")
    host.check_clean()


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_the_first_ctrl_c_drains_and_the_second_leaves_nothing_whatever_host_is_down(net: SshNet, again: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        net.configure("silent", f"Port {silent.getsockname()[1]}")
        host, master = start_long_tasks(net, *on("silent"), "--results", "results.jsonl", 0)
        processes = master.descendants()
        assert len(processes) == 2
        master.drain(signal.SIGINT)
        if again:
            master.signal(signal.SIGINT)
        else:
            (folder,) = host.tmp.iterdir()
            (folder / "go").touch()
        assert master.wait() == 130
        assert len(net.farm.records()) == (0 if again else 2)  # what ran is finished, and no more is begun
        assert bool(master.said("leaving at once|redelivered since")) == again
        host.check_clean()
        check_ended(processes)


def test_a_jump_host_that_hangs_keeps_no_master_from_its_end(net: SshNet) -> None:
    net.configure("beyond", "ProxyCommand sleep 1000")  # which has the standard error of ssh
    master = net.master("--workers", 1, *on("beyond"), "--function", "functions:stay", 1)
    master.wait_line("worker .* connected")
    wait_until(lambda: any(process.name() == "sleep" for process in master.descendants()))
    processes = master.descendants()
    net.farm.let_go()
    assert master.wait() == 0
    check_ended(processes)


@pytest.mark.parametrize("line", ["RemoteForward 127.0.0.1:0 127.0.0.1:9", "ClearAllForwardings yes"])
def test_neither_forwardings_of_the_user_nor_a_banner_without_a_line_end_keep_a_worker_away(net: SshNet, line: str) -> None:
    net.host("host1", more=f"Banner {net.farm.write('banner', 'Authorized users only')}")
    net.configure("host1", line)
    master = net.master(*on("1/host1"), "--function", "functions:double", 1)
    assert master.wait() == 0
    assert not master.said("trying again")


def test_what_another_attempt_would_not_mend_is_hopeless() -> None:
    assert task_master.find_hopeless("channel 0: open failed: administratively prohibited: open failed")
    assert task_master.find_hopeless("Cannot execute command-line and remote command.")
    assert not task_master.find_hopeless("stdio forwarding failed")  # a jump host, when the host behind it is down


def test_a_host_is_read() -> None:
    texts = ["host", "4/me@10.0.0.5", "me@host:~/venv/bin/python", "12/host:nice -n 19 python3"]
    found = [match.groups() for match in map(task_master.match_ssh_host, texts) if match]
    assert found[:2] == [(None, "host", None), ("4", "me@10.0.0.5", None)]
    assert found[2:] == [(None, "me@host", "~/venv/bin/python"), ("12", "host", "nice -n 19 python3")]


OPTIONS = ["-oProxyCommand=x", "2/-oProxyCommand=x", "host:-oProxyCommand=x"]  # of ssh, they would be
BAD = ["", "a b", "host\n", 5, None, *"[-x] 0/host x/host host: host:22 ::1 fe80::1 2/ :py".split()]


@pytest.mark.parametrize("text", [*OPTIONS, *BAD])
def test_what_is_no_host_is_refused(text: Any) -> None:
    with pytest.raises(Failure, match=r"ssh: .*(is not a host: it takes one \[N/\]HOST\[:PYTHON\]|it takes a str)"):
        TaskMaster(port=0, authkey=b"k" * 16, ssh=[text])
    with pytest.raises(Failure, match="ssh: it takes a list"):
        TaskMaster(port=0, authkey=b"k" * 16, ssh=text or "host1")


def test_a_missing_ssh_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Failure, match="needs the program ssh, which is not on the PATH: install OpenSSH's client"):
        TaskMaster(port=0, authkey=b"k" * 16, ssh=["host1"])


def test_from_python(net: SshNet, monkeypatch: pytest.MonkeyPatch) -> None:
    host = net.host("host1")
    monkeypatch.chdir(net.farm.folder)
    monkeypatch.setenv("PATH", str(net.bin), prepend=os.pathsep)
    with TaskMaster(port=0, authkey=b"k" * 16, ssh=["host1", "2/host1"], function="functions:double") as master:
        for _ in range(2):
            assert sorted(record.result for record in master.run(range(50))) == [2 * n for n in range(50)]
    host.check_clean()

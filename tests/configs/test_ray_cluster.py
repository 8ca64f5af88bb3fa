"""`slipstream cluster`: starts what it says, ends what it started, and compares versions first."""

import io
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from slipstream.buffer.errors import ConfigError, SlipstreamError
from slipstream.configs import ray_cluster, ray_node

SSH = """#!/bin/sh
# A stand-in for ssh, which needs a server: the command is noted, and answered as a host would.
while [ "$1" = -o ]; do shift 2; done
echo "$1 $2" >> {log}
test -f {answers}/"$1" || exit 255
case "$2" in
*importlib*) cat {answers}/"$1" ;;
*" start "*) cat > {log}-token-"$1"
    test -f {answers}/fails-"$1" && {{ echo "a Ray node did not start" >&2; exit 1; }}
    test -f {answers}/odd-"$1" && {{ echo "Have a nice day"; exit; }}
    echo '{{"pid": 7, "started": "1", "folder": "/there"}}' ;;
*" end "*) echo ended ;;
esac
"""
REAL_SSH = """#!/bin/sh
# A stand-in for ssh that does what a server does with a command: it gives it to a shell.
while [ "$1" = -o ]; do shift 2; done
exec env -i HOME="$HOME" PATH="$PATH" XDG_STATE_HOME="$XDG_STATE_HOME/$1" sh -c "$2"
"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets for Ray must not reach the next test."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    answers = tmp_path / "answers"
    answers.mkdir()
    for host in ("a", "b"):
        (answers / host).write_text("3.11.7 2.60.0 0.1.0\n")
    script = tmp_path / "ssh"
    script.write_text(SSH.format(log=tmp_path / "log", answers=answers))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hosts.toml").write_text('head = "a"\nworkers = ["b"]\npython = "py"\n')
    return tmp_path


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State and home folders in which neither we nor Ray ever made anything."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(ssh: Path) -> list[str]:
    lines = (ssh / "log").read_text().splitlines()
    return [line for line in lines if "importlib" not in line]


def test_hosts_are_started_head_first_and_ended_head_last(ssh: Path) -> None:
    started = ray_cluster.up_hosts(ssh / "hosts.toml")
    assert started.address == "a:6379"
    assert stat.S_IMODE(ray_cluster.state_file().stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="a cluster is up at a:6379"):
        ray_cluster.up_hosts(ssh / "hosts.toml")
    assert ray_cluster.down() == ["b: ended", "a: ended"]
    assert [line.split()[0] for line in commands(ssh)] == ["a", "b", "b", "a"]
    assert "start --head --port=6379" in commands(ssh)[0]
    assert "start --address=a:6379" in commands(ssh)[1]
    assert all('"pid":7' in line for line in commands(ssh)[2:])
    token = (ssh / "log-token-a").read_text()
    assert token == (ssh / "log-token-b").read_text()
    assert len(token) == 64
    assert token not in (ssh / "log").read_text()
    with pytest.raises(ConfigError, match="no cluster of ours is up"):
        ray_cluster.down()


def test_when_one_host_fails_to_start_those_that_did_are_ended(ssh: Path) -> None:
    (ssh / "answers" / "fails-b").touch()
    with pytest.raises(ConfigError, match=r"^b: a Ray node did not start"):
        ray_cluster.up_hosts(ssh / "hosts.toml")
    assert [line.split()[0] for line in commands(ssh)] == ["a", "b", "a"]
    assert " end " in commands(ssh)[-1]
    assert ray_cluster.read() is None


def test_a_node_that_could_not_be_ended_is_said_and_kept_until_it_is(ssh: Path) -> None:
    ray_cluster.up_hosts(ssh / "hosts.toml")
    token = ray_cluster.state_file().with_name("ray.token")
    (ssh / "answers" / "b").rename(ssh / "b")
    remedy = f"gone for good, remove {ray_cluster.state_file()}"
    told = rf"(?s)^b: NOT ended: .*\na: ended\n.*tries again.* {remedy}"
    with pytest.raises(SlipstreamError, match=told):
        ray_cluster.down()
    left = ray_cluster.read()
    assert left is not None
    assert [host for host, _ in left.nodes] == ["b"]
    assert token.exists()
    with pytest.raises(ConfigError, match="a cluster is up at a:6379"):
        ray_cluster.up_hosts(ssh / "hosts.toml")
    (ssh / "b").rename(ssh / "answers" / "b")
    assert ray_cluster.down() == ["b: ended"]
    assert ray_cluster.read() is None
    assert not token.exists()


def test_what_a_failed_start_could_not_end_is_said_and_kept(
    ssh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ssh / "answers" / "fails-b").touch()
    answers = ray_cluster._ssh

    def no_end(host: str, command: Sequence[str], given: str = "") -> str:
        if "end" in command:
            raise ConfigError(f"{host} cannot be reached")
        return answers(host, command, given)

    with monkeypatch.context() as patch:
        patch.setattr(ray_cluster, "_ssh", no_end)
        told = r"(?s)^b: a Ray node did not start.*\na: NOT ended: a cannot be reached"
        with pytest.raises(SlipstreamError, match=told):
            ray_cluster.up_hosts(ssh / "hosts.toml")
    assert ray_cluster.down() == ["a: ended"]


def test_a_host_that_does_not_say_its_nodes_number_is_named_with_what_it_said(ssh: Path) -> None:
    (ssh / "answers" / "odd-b").touch()
    told = r"^b: a Ray node started there.*'Have a nice day.*`py -m ray\.scripts\.scripts stop`"
    with pytest.raises(ConfigError, match=told):
        ray_cluster.up_hosts(ssh / "hosts.toml")
    assert [line.split()[0] for line in commands(ssh)] == ["a", "b", "a"]
    assert ray_cluster.read() is None


def test_a_node_whose_caller_went_away_meanwhile_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    node = ray_node.Node(7, "1", "/there")
    ended: list[ray_node.Node] = []
    monkeypatch.setattr(ray_node, "start", lambda arguments, token: node)
    monkeypatch.setattr(ray_node, "end", ended.append)
    monkeypatch.setattr(sys, "argv", ["ray_node", "start", "--head"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("token"))
    reader, writer = os.pipe()
    os.close(reader)
    gone = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", gone)
    with pytest.raises(SystemExit, match="the caller went away"):
        ray_node.main()
    assert ended == [node]
    with suppress(BrokenPipeError):
        gone.close()


def test_versions_are_compared_before_anything_starts(ssh: Path) -> None:
    (ssh / "answers" / "b").write_text("3.11.7 2.59.0 0.1.0\n")
    with pytest.raises(ConfigError, match=r"the hosts differ .* b: 3\.11\.7 2\.59\.0"):
        ray_cluster.up_hosts(ssh / "hosts.toml")
    assert commands(ssh) == []


def test_a_host_that_cannot_be_reached_is_named_and_nothing_stays_up(ssh: Path) -> None:
    (ssh / "answers" / "b").unlink()
    with pytest.raises(ConfigError, match=r"^b: "):
        ray_cluster.up_hosts(ssh / "hosts.toml")
    assert ray_cluster.read() is None
    assert not ray_cluster.state_file().with_name("ray.token").exists()


@pytest.mark.parametrize("text", ["", "head = 3", 'head = "a"\nworker = ["b"]', "head = ["])
def test_a_hosts_file_that_is_none_is_refused(ssh: Path, text: str) -> None:
    (ssh / "bad.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.toml: .*head"):
        ray_cluster.up_hosts(ssh / "bad.toml")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_local_nodes_are_started_seen_and_all_ended(fresh_home: Path) -> None:
    nodes = [node for _, node in ray_cluster.up_local(2, cpus=3, gpus=8).nodes]
    assert len(processes_of(nodes)) > 4
    (session,) = {path for pid, path in ray_node._sessions() if pid in processes_of(nodes)}
    try:
        token = fresh_home / "slipstream" / "ray.token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        lines = status()
        assert len([line for line in lines if "3 of 3 CPU, 8 of 8 GPU free" in line]) == 2, lines
    finally:
        assert len(ray_cluster.down()) == 2
    assert processes_of(nodes) == set(), "nothing is left behind"
    assert not Path(session).exists()
    assert ray_cluster.read() is None
    assert not token.exists()
    assert list((fresh_home / "slipstream").iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hosts_of_a_file_are_a_cluster_until_they_are_ended_and_no_other_ray_is(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts of one machine; each is reached by a shell, as ssh would reach it."""
    (fresh_home / "ssh").write_text(REAL_SSH)
    (fresh_home / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fresh_home}{os.pathsep}{os.environ['PATH']}")
    port = ray_node.free_port()
    (fresh_home / "hosts.toml").write_text(
        f'head = "127.0.0.1"\nworkers = ["localhost"]\nport = {port}\n'
    )
    other = ray_node.start(["--head", f"--port={ray_node.free_port()}", "--num-cpus=1"], "0" * 64)
    try:
        nodes = [node for _, node in ray_cluster.up_hosts(fresh_home / "hosts.toml").nodes]
        try:
            lines = status()
            assert len([line for line in lines if "CPU" in line]) == 2, lines
        finally:
            assert ray_cluster.down() == ["localhost: ended", "127.0.0.1: ended"]
        assert processes_of(nodes) == set()
        assert len(processes_of([other])) > 4
    finally:
        assert ray_node.end(other) == "ended"
    left = [p for p in fresh_home.rglob("*") if p.is_file() and p.name not in ("ssh", "hosts.toml")]
    assert [p for p in left if "slipstream" in p.parts] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_submitted_experiment_runs_as_a_job_that_the_printed_line_follows(
    fresh_home: Path,
) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def shell(line: str) -> str:
        """Ray reads its token once in a process: each command has one of its own."""
        return subprocess.run(
            ["bash", "-c", line], env={**os.environ, "PATH": path}, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=250,
        ).stdout  # fmt: skip

    ray_cluster.up_local(1, cpus=4)
    try:
        said = shell(
            "slipstream submit quickstart learner.steps=2 learner.prompts_per_step=4 "
            "sft.examples=320 buffer.drop_no_signal=false eval.enabled=false"
        )
        followed = shell(said.partition("follow it with: ")[2])
        assert "audit: ok" in followed, followed
        assert "succeeded" in followed
    finally:
        ray_cluster.down()
    (run_json,) = fresh_home.glob("runs/quickstart-*/run.json")
    assert '"status": "finished"' in run_json.read_text()


def status() -> list[str]:
    """Ray reads whether there is a token when it is imported, which other tests here may have."""
    command = [sys.executable, "-m", "slipstream.configs.cli", "cluster", "status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def processes_of(nodes: list[ray_node.Node]) -> set[int]:
    """What runs in the sessions of some nodes; other tests may have a Ray of their own."""
    leaders, found = {node.pid for node in nodes}, set()
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and os.getsid(process.pid) in leaders:
                found.add(process.pid)
    return found


@pytest.mark.parametrize(
    ("address", "known"),
    [("auto", True), ("127.0.0.1:7001", True), ("localhost:7001", True),
     ("127.0.0.1:7002", False), ("192.0.2.1:7001", False), ("no-such-host.invalid:7001", False)],
)  # fmt: skip
@pytest.mark.parametrize("as_auto", [False, True])
def test_only_the_cluster_that_we_started_is_shown_its_token(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch, address: str, known: bool, as_auto: bool
) -> None:
    monkeypatch.setattr(os, "environ", {"XDG_STATE_HOME": str(fresh_home)})
    our_cluster("127.0.0.1:7001")
    if as_auto and address != "auto":
        os.environ["RAY_ADDRESS"], address = address, "auto"
    ray_cluster.use_our_token(address)
    assert ("RAY_AUTH_TOKEN_PATH" in os.environ) == known


@pytest.mark.filterwarnings("ignore")
def test_a_job_server_elsewhere_is_not_shown_our_token(fresh_home: Path) -> None:
    our_cluster("127.0.0.1:7001")
    with pytest.raises(ConfigError, match=r"no Ray job server at http://127\.0\.0\.1:1"):
        ray_cluster.submit("quickstart", (), "http://127.0.0.1:1")
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def our_cluster(address: str) -> None:
    ray_cluster.state_folder().mkdir(parents=True, exist_ok=True)
    ray_cluster._write(ray_cluster.Started(address=address, nodes=()))

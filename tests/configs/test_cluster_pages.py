"""What docs/cluster.md says of SLURM and Kubernetes, as far as it can be checked without them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from slipstream.configs.load import load_experiment
from slipstream.configs.placement import shortage
from slipstream.configs.run_dir import read_run
from slipstream.configs.schema import Experiment

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
SRUN = """#!/bin/bash
# A stand-in: all nodes are this machine.
while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done
if [[ "$*" == *--address=* && $1 == ray ]]; then set -- "$@" --dashboard-agent-listen-port=0; fi
[[ $1 == ray ]] && set -- "$@" --num-cpus=2
exec "$@"
"""


def block(title: str) -> str:
    found = re.search(rf'title="{re.escape(title)}"\n(.*?)^```', PAGE.read_text(), re.M | re.S)
    assert found
    return found[1]


@pytest.fixture
def fleet(tmp_path: Path) -> Experiment:
    (tmp_path / "fleet.toml").write_text(block("fleet.toml"))
    return load_experiment(tmp_path / "fleet.toml").experiment


def test_the_sbatch_script_asks_slurm_for_what_its_experiment_asks_ray_for(
    fleet: Experiment,
) -> None:
    asked = dict(re.findall(r"--([a-z-]+)=(\d+)", block("slipstream.sbatch").splitlines()[1]))
    node = {"GPU": float(asked["gpus-per-node"]), "CPU": float(asked["cpus-per-task"])}
    assert shortage(fleet, [node] * int(asked["nodes"])) == ""
    assert shortage(fleet, [node] * (int(asked["nodes"]) - 1))


def test_the_rayjob_has_what_its_experiment_asks_for_and_writes_where_all_pods_see_it(
    fleet: Experiment,
) -> None:
    job: dict[str, Any] = yaml.safe_load(block("slipstream-rayjob.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    pods = [g["template"]["spec"] for g in (cluster["headGroupSpec"], group)]
    limits = pods[1]["containers"][0]["resources"]["limits"]
    node = {"GPU": float(limits["nvidia.com/gpu"]), "CPU": 32.0}
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert shortage(fleet, [node] * group["replicas"]) == ""
    mounts = [pod["containers"][0]["volumeMounts"][0] for pod in pods]
    assert mounts[0] == mounts[1]
    assert all(pod["volumes"][0]["name"] == mounts[0]["name"] for pod in pods)
    _, command, experiment, runs_dir, *options = job["spec"]["entrypoint"].split()
    assert (command, options) == ("run", ["--launcher", "ray", "--address", "auto"])
    assert Path(experiment).is_relative_to(mounts[0]["mountPath"])
    assert Path(runs_dir.partition("runs_dir=")[2]).is_relative_to(mounts[0]["mountPath"])


@pytest.mark.slow
def test_the_sbatch_script_starts_ray_runs_and_leaves_nothing(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands, two nodes on one machine, and a small experiment."""
    stubs = {"srun": SRUN, "scontrol": "#!/bin/sh\nprintf 'one\\ntwo\\n'\n"}
    for name, text in stubs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "fleet.toml").write_text(
        'extends = "quickstart"\nlauncher = "ray"\n[learner]\nsteps = 2\nprompts_per_step = 4\n'
        "[sft]\nexamples = 320\n[buffer]\ndrop_no_signal = false\n[eval]\nenabled = false\n"
    )
    (tmp_path / "job").write_text(block("slipstream.sbatch"))
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "PATH": path, "HOME": str(tmp_path), "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "one,two", "SLURM_JOB_NUM_NODES": "2",
    }  # fmt: skip
    with (tmp_path / "output").open("w") as output:
        done = subprocess.run(
            ["bash", "job"], cwd=tmp_path, env=environment, stdout=output, stderr=output,
            timeout=280, check=False,
        )  # fmt: skip
    said = (tmp_path / "output").read_text()
    assert done.returncode == 0, said
    assert "audit: ok" in said
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert read_run(run_dir).status == "finished"
    assert not (tmp_path / ".ray-token-7").exists()

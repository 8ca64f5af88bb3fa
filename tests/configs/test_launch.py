"""What happens before processes start, and what is known of a run afterwards."""

import asyncio
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from slipstream.buffer.errors import ConfigError
from slipstream.configs import launch, preflight, scratch
from slipstream.configs.claim import process_start_time, running_supervisor, supervising
from slipstream.configs.closing import print_closing, resume_line
from slipstream.configs.feed import Event
from slipstream.configs.load import Loaded, load_experiment, load_table
from slipstream.configs.models import TINY_DIR
from slipstream.configs.result import Audited, Exported, RunResult, summarise, verdict
from slipstream.configs.run_dir import (
    create_run_dir,
    end_branch,
    read_experiment,
    read_run,
    write_run,
)
from slipstream.configs.specs import (
    Launch,
    PreflightSpec,
    learner_spec,
    process_names,
    process_plan,
    user_module_path,
)
from slipstream.configs.track import check_tracking, make_trackers, scalars

ROWS = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]


def load(tmp_path: Path, **sections: Any) -> Loaded:
    """A small experiment on 40 rows, its runs in `tmp_path/runs`."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = {
        "runs_dir": str(tmp_path / "runs"),
        "prompts": {"source": "dataset", "path": str(data), "held_out": 8},
        "reward": {"name": "exact_match"},
        "learner": {"steps": 4, "prompts_per_step": 2},
        **sections,
    }
    return load_table(table, name="small")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def run_folders(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else []


def test_a_run_folder_is_private_and_says_what_it_will_do(tmp_path: Path) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert run_dir.name.startswith("small-")
    assert json.loads((run_dir / "resolved.json").read_text())["learner"]["steps"] == 4
    again = load_experiment(run_dir / "resolved.toml").experiment
    assert again == load(tmp_path).experiment
    assert "One step and the run" in (run_dir / "plan.txt").read_text()
    run = read_run(run_dir)
    assert run.status == "running"
    assert {"python", "torch", "transformers"} <= set(run.versions)
    assert [branch.branch for branch in run.branches] == [0]


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert create_run_dir(loaded, None) != create_run_dir(loaded, None)


def test_a_folder_that_is_already_a_run_is_refused_with_how_to_continue(tmp_path: Path) -> None:
    create_run_dir(load(tmp_path), tmp_path / "out")
    with pytest.raises(ConfigError, match="already a run; continue it with `slipstream resume"):
        create_run_dir(load(tmp_path), tmp_path / "out")


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        create_run_dir(load(tmp_path), tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        create_run_dir(load(tmp_path), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"reward": {"name": "exact_mtach"}}, "did you mean 'exact_match'"),
        ({"reward": {"name": "{dir}/r.py:raises"}}, "the reward raised ValueError: nothing fits"),
        ({"reward": {"name": "{dir}/r.py:nan"}}, "the reward returned nan; it must be finite"),
        (
            {"reward": {"name": "{dir}/r.py:hangs", "timeout_s": 0.5}},
            r"took longer than reward\.timeout_s = 0\.5 s",
        ),
        ({"reward": {"name": "{dir}/hangs.py:x"}}, "there is no file"),
        ({"prompts": {"prompt_column": "qestion"}}, "It has: prompt, answer"),
        ({"model": "/nowhere/model"}, "there is no folder /nowhere/model"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    if "model" not in sections:
        monkeypatch.setattr(launch, "resolve_model", lambda model, run_dir, say: run_dir)
    (tmp_path / "r.py").write_text(
        "import time\n"
        "def raises(completion, prompt): raise ValueError('nothing fits')\n"
        "def nan(completion, prompt): return float('nan')\n"
        "def hangs(completion, prompt): time.sleep(600)\n"
    )
    sections = json.loads(json.dumps(sections).replace("{dir}", str(tmp_path)))
    if "prompts" in sections:
        sections["prompts"] |= {"source": "dataset", "path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ConfigError, match=message):
        launch.run(load(tmp_path, **sections), console=quiet())
    assert run_folders(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", r"has no readable tokenizer"),
        ("config.json", '{"model_type": "martian"}', "martian"),
        ("config.json", '{"model_type": "vit"}', "names no causal language model"),
    ],
)
def test_a_model_folder_that_does_not_load_is_refused_before_anything_starts(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    shutil.copytree(TINY_DIR, tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        launch.run(load(tmp_path, model=str(tmp_path / "model")), console=quiet())
    assert run_folders(tmp_path) == []


def test_a_warm_start_on_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.data = .*nowhere\.jsonl.* cannot be read"):
        launch.run(load(tmp_path, sft={"data": str(tmp_path / "nowhere.jsonl")}), console=quiet())
    assert run_folders(tmp_path) == []


async def test_a_check_that_fails_leaves_no_other_for_the_event_loop_to_cancel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's end cancels all tasks at once, those of a process being started, too: asyncio of
    Python 3.11 may then wait for that process for ever."""
    ended: list[bool] = []

    async def slow(*_: object) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # as a pool that ends its processes
            ended.append(True)

    monkeypatch.setattr(preflight, "check_reward", slow)
    sft = {"data": str(tmp_path / "nowhere.jsonl")}
    experiment = load(tmp_path, sft=sft).experiment
    spec = PreflightSpec(
        run_dir=tmp_path,
        seed=0,
        prompts=experiment.prompts,
        reward=experiment.reward,
        sft=experiment.sft,
        sft_file=tmp_path / "sft.jsonl",
    )
    with pytest.raises(ConfigError, match="cannot be read"):
        await preflight.preflight(spec)
    assert ended == [True]


def test_wandb_is_refused_when_it_is_not_installed(tmp_path: Path) -> None:
    if __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match=r"needs wandb: pip install 'slipstream\[wandb\]'"):
        check_tracking(load(tmp_path, track={"wandb_project": "p"}).experiment.track)


def test_a_run_is_supervised_by_one_living_process_at_a_time(tmp_path: Path) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    assert running_supervisor(run_dir) is None
    with supervising(run_dir):
        assert running_supervisor(run_dir) == os.getpid()
        with pytest.raises(ConfigError, match="is running"), supervising(run_dir):
            pass
    assert running_supervisor(run_dir) is None


def test_a_number_that_a_killed_supervisor_left_is_nobodys(tmp_path: Path) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    (run_dir / "processes" / "supervisor.pid").write_text(f"{os.getpid()}\n")
    assert running_supervisor(run_dir) is None
    with supervising(run_dir):
        assert running_supervisor(run_dir) == os.getpid()


def test_of_many_supervisors_at_once_one_owns_the_run(tmp_path: Path) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    inside: list[int] = []

    def try_it(number: int) -> bool:
        try:
            with supervising(run_dir):
                inside.append(number)
                assert len(inside) == 1
                time.sleep(0.5)  # longer than a look is waited for
                inside.remove(number)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_it, range(8))) == 1
    with supervising(run_dir):  # the file stays, the lock does not
        assert running_supervisor(run_dir) == os.getpid()


def test_the_file_of_a_run_is_on_disk_before_it_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    done: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def noted_fsync(fd: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def noted_replace(self: Path, target: Path) -> Path:
        done.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_run(run_dir, read_run(run_dir))
    assert done == ["run.json.new", "replace", run_dir.name]


def test_tmpfs_is_asked_for_room_for_every_version_that_may_lie_there(tmp_path: Path) -> None:
    asked = shutil.disk_usage(scratch.TMPFS).free - scratch.SPARE_BYTES
    just_too_large = asked // 5 + 1  # newest two, evaluated, being written, still mapped
    with scratch.scratch(tmp_path, "r3", just_too_large) as places:
        assert places.weights_dir == tmp_path / "weights"


@pytest.mark.parametrize("status", ["finished", "running"])
def test_resume_refuses_a_run_that_is_finished_or_running(tmp_path: Path, status: str) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    if status == "finished":
        end_branch(run_dir, "finished", "", None)
    with (
        supervising(run_dir) if status == "running" else nullcontext(),
        pytest.raises(ConfigError, match=f"is {status}"),
    ):
        launch.resume(run_dir, console=quiet())


def test_what_a_resume_changes_is_in_the_runs_config_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    end_branch(run_dir, "interrupted", "", None)
    launched: list[Launch] = []
    monkeypatch.setattr(launch, "check_folder", lambda *_: None)
    monkeypatch.setattr(launch, "check_launcher", lambda *_: None)
    monkeypatch.setattr(launch, "run_branches", lambda told, *_, **__: launched.append(told))
    changes = ["rollout.workers=3", "launcher=ray", "cluster.stall_s=60.0"]
    launch.resume(run_dir, changes, console=quiet())
    assert launched[0].experiment == load_table(
        load(tmp_path).experiment.model_dump(mode="json"), changes
    ).experiment  # fmt: skip
    assert read_experiment(run_dir) == launched[0].experiment
    assert load_experiment(run_dir / "resolved.toml").experiment == launched[0].experiment


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "learner.steps=9",
            r"learner\.steps cannot change .* rollout\.workers, launcher and clust",
        ),
        ("rollout.workers_=9", "cannot change when a run is resumed"),
        ("rollout.workers=0", r"rollout\.workers \(command line\) is 0"),
        ("cluster.stall=9", r"unknown key cluster\.stall \(command line\).*did you mean"),
        ("launcher", "must look like"),
    ],
)
def test_what_decides_what_is_trained_or_makes_no_sense_is_refused_on_resume_and_nothing_changes(
    tmp_path: Path, override: str, words: str
) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    with pytest.raises(ConfigError, match=words):
        launch.resume(run_dir, ["cluster.restarts=9", override], console=quiet())
    assert read_experiment(run_dir) == load(tmp_path).experiment
    assert len(read_run(run_dir).branches) == 1


@pytest.mark.parametrize("refuses", ["check_launcher", "check_folder", "_next_branch"])
def test_what_a_resume_changes_is_not_kept_when_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    end_branch(run_dir, "interrupted", "", None)

    def refuse(*_: object) -> None:
        raise ConfigError("no Ray cluster")

    monkeypatch.setattr(launch, "check_folder", lambda *_: None)
    monkeypatch.setattr(launch, "check_launcher", lambda *_: None)
    monkeypatch.setattr(launch, refuses, refuse)
    with pytest.raises(ConfigError, match="no Ray cluster"):
        launch.resume(run_dir, ["launcher=ray"], console=quiet())
    assert read_experiment(run_dir) == load(tmp_path).experiment
    assert load_experiment(run_dir / "resolved.toml").experiment == load(tmp_path).experiment
    assert len(read_run(run_dir).branches) == 1


def test_stop_refuses_a_run_that_is_not_running(tmp_path: Path) -> None:
    run_dir = create_run_dir(load(tmp_path), None)
    with pytest.raises(ConfigError, match="is not running"):
        launch.stop(run_dir)


def test_a_folder_without_a_run_is_refused_by_every_command(tmp_path: Path) -> None:
    for command in (launch.resume, launch.stop):
        with pytest.raises(ConfigError, match=r"is not a run folder: it has no run\.json"):
            command(tmp_path)


def test_the_processes_are_told_the_same_run_branch_and_endpoint(tmp_path: Path) -> None:
    loaded = load(tmp_path, rollout={"workers": 3})
    run_dir = create_run_dir(loaded, None)
    told = Launch(
        experiment=loaded.experiment, run=read_run(run_dir), run_dir=run_dir, model_dir=tmp_path
    )
    places = scratch.Scratch(endpoint="ipc:///tmp/x/buffer", weights_dir=tmp_path)
    plans = {n: process_plan(told, places, n) for n in process_names(told.experiment)}
    assert list(plans) == ["learner", "buffer", "worker-0", "worker-1", "worker-2", "feeder"]
    specs = [json.loads(plan.spec.model_dump_json()) for plan in plans.values()]
    assert {spec["endpoint"] for spec in specs} == {"ipc:///tmp/x/buffer"}
    assert {spec["run_id"] for spec in specs} == {read_run(run_dir).run_id}


@pytest.mark.parametrize(
    ("weights", "engine_dtype"), [("as_trained", "float32"), ("bfloat16", "bfloat16")]
)
def test_the_learner_is_told_what_engines_compute_in(
    tmp_path: Path, weights: str, engine_dtype: str
) -> None:
    loaded = load(tmp_path, dtype="float32", rollout={"weights": weights})
    run = read_run(create_run_dir(loaded, None))
    told = Launch(experiment=loaded.experiment, run=run, run_dir=tmp_path, model_dir=tmp_path)
    places = scratch.Scratch(endpoint="ipc:///tmp/x/buffer", weights_dir=tmp_path)
    assert learner_spec(told, places).engine_dtype == engine_dtype


def test_user_modules_are_found_in_the_working_directory_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    loaded = load(tmp_path, reward={"name": "mine:reward"})
    told = Launch(
        experiment=loaded.experiment,
        run=read_run(create_run_dir(loaded, None)),
        run_dir=tmp_path,
        model_dir=tmp_path,
    )
    spec = launch.preflight_plan(told).spec
    assert user_module_path(spec, tmp_path)["PYTHONPATH"].startswith(str(tmp_path))
    assert user_module_path(spec, tmp_path / "runs") == {}


def test_scratch_places_are_private_short_and_removed(tmp_path: Path) -> None:
    with scratch.scratch(tmp_path, "r1", 1000) as places:
        socket = Path(places.endpoint.removeprefix("ipc://"))
        assert len(str(socket)) <= scratch.MAX_SOCKET_PATH
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert places.weights_dir.is_dir()
    assert not socket.parent.exists()
    assert not places.weights_dir.exists()


def test_weights_that_do_not_fit_into_tmpfs_lie_in_the_run_folder(tmp_path: Path) -> None:
    with scratch.scratch(tmp_path, "r2", 1 << 60) as places:
        assert places.weights_dir == tmp_path / "weights"


def test_weights_of_a_supervisor_that_was_killed_are_swept_and_others_kept(tmp_path: Path) -> None:
    for name, owner in {"dead": "999999999 5", "alive": f"{os.getpid()} {_started()}"}.items():
        folder = tmp_path / f"slipstream-{os.getuid()}-{name}"
        folder.mkdir()
        (folder / "owner").write_text(owner)
    scratch.sweep(tmp_path)
    assert [path.name.rpartition("-")[2] for path in tmp_path.iterdir()] == ["alive"]


def _started() -> str | None:
    return process_start_time(os.getpid())


def proof(**changes: Any) -> dict[str, Any]:
    return {
        "bound": 1, "max_lag": 1, "violations": 0, "orphaned_tokens": 0, "trained_tokens": 100,
        "mixed_trajectories": 1, "trained_trajectories": 4, "dropped": {"no_signal": 2},
        "length_bias": 0.98, "lag_counts": {"0": 60, "1": 40}, **changes,
    }  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The files of a run of three steps, of which the last was redone by a resume."""
    steps = [(1, 110.0, {}), (2, 112.0, {}), (3, 114.0, {"violations": 1}), (3, 120.0, {})]
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": k, "time": t, "seconds": 2.0, "logprob_gap_max": 1e-6, "proof": proof(**p)}
            for k, t, p in steps
        ],
    )
    write_lines(
        tmp_path / "eval.jsonl",
        [
            {
                "step": k,
                "reward_mean": m,
                "ci95_low": m - 0.04,
                "ci95_high": m + 0.04,
                "prompts": 512,
            }
            for k, m in [(0, 0.3), (3, 0.8)]
        ],
    )
    return tmp_path


def result_of(run_dir: Path, **changes: Any) -> Any:
    arguments = {
        "status": "finished", "reason": "", "planned_steps": 3, "created_s": 100.0, "seconds": 25.0,
        "exported": Exported(path=str(run_dir / "export"), ok=True, max_logit_difference=2e-7),
        "audited": Audited(ok=True, line="issued 12 = 12 trained"),
        **changes,
    }  # fmt: skip
    return summarise(run_dir, **arguments)


def test_the_result_counts_each_step_once_but_every_violation(finished: Path) -> None:
    result = result_of(finished)
    assert (result.steps, result.tokens_trained, result.mixed_fraction) == (3, 300, 0.25)
    assert result.staleness_violations == 1
    assert result.first_step_seconds == 10.0
    assert result.tokens_per_s == 300 / 6.0
    assert result.dropped == {"no_signal": 6}
    assert result.reward_rise == pytest.approx(0.5)


def test_the_result_is_found_in_run_json(tmp_path: Path, finished: Path) -> None:
    run_dir = create_run_dir(load(tmp_path), tmp_path / "run")
    end_branch(run_dir, "finished", "", result_of(finished))
    stored = json.loads((run_dir / "run.json").read_text())
    assert stored["result"]["reward_rise"] == pytest.approx(0.5)
    assert stored["result"]["export"]["ok"] is True
    assert stored["result"]["audit"] == {"ok": True, "line": "issued 12 = 12 trained"}
    assert stored["branches"][0]["status"] == "finished"


def closing(run_dir: Path, **changes: Any) -> str:
    result = result_of(run_dir, **changes)
    run = RunResult(run_dir=run_dir, seed=0, status=result.status, exit_code=0, result=result)
    console = quiet()
    print_closing(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_closing_screen_says_what_happened_where_things_are_and_what_to_try(
    finished: Path,
) -> None:
    text = closing(finished)
    for line in (
        "held-out reward rose: from 0.300 [95% CI 0.260, 0.340] to 0.800 [95% CI 0.760, 0.840] on "
        "512 prompts (+0.500, step 3)",
        "3 of 3 steps in 0:25, first step after 10.0 s, 300 tokens trained (50/s)",
        "max lag 1 (bound 1): 1 staleness violations, 0 orphaned tokens",
        "25.0% of the trained trajectories hold two versions or more",
        "samples dropped: 6 no_signal; length bias 0.980 (mean tokens trained / issued)",
        "log-prob gap between rollout and learner: at most 1.0e-06 on tokens of one version",
        "audit: ok, issued 12 = 12 trained",
        "reloads with logits equal to 2.0e-07",
        f"slipstream show {finished} --step 3 --pick worst",
        f"slipstream run {finished}/resolved.toml seed=1",
    ):
        assert line in text, line


def test_a_reward_that_did_not_rise_is_not_called_a_success(finished: Path) -> None:
    row = {"reward_mean": 0.31, "ci95_low": 0.27, "ci95_high": 0.35, "prompts": 512}
    write_lines(
        finished / "eval.jsonl", [{"step": 0, **row}, {"step": 3, **row, "reward_mean": 0.33}]
    )
    text = closing(finished)
    assert "held-out reward did not change measurably" in text
    assert "this run did not improve the policy" in text


def test_a_failed_run_ends_with_its_reason_and_the_line_that_resumes_it(finished: Path) -> None:
    text = closing(finished, status="failed", reason="learner was killed by SIGKILL")
    assert "reason: learner was killed by SIGKILL" in text
    assert resume_line(finished) in text


def test_the_verdict_needs_a_difference_beyond_its_interval(finished: Path) -> None:
    first = result_of(finished).reward_first
    final = result_of(finished).reward_final
    assert verdict(first, final) == "rose"
    assert verdict(final, first) == "fell"
    assert verdict(first, first) == "did not change measurably"


def test_evaluations_without_intervals_are_not_compared(finished: Path) -> None:
    row = {"reward_mean": 0.5, "ci95_low": None, "ci95_high": None, "prompts": 1}
    write_lines(finished / "eval.jsonl", [{"step": 0, **row}, {"step": 3, **row}])
    result = result_of(finished)
    assert verdict(result.reward_first, result.reward_final) == "not comparable"
    assert "reward not comparable: from 0.500 [no interval] to 0.500" in closing(finished)
    row["reward_mean"] = None
    write_lines(finished / "eval.jsonl", [{"step": 0, **row}, {"step": 3, **row}])
    assert result_of(finished).reward_rise is None
    assert "from unknown (no sample could be scored)" in closing(finished)


def test_siblings_say_their_seed_and_name_in_the_experiment_that_runs_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        launch, "run", lambda loaded, *_, **__: SimpleNamespace(loaded=loaded, status="finished")
    )
    monkeypatch.setattr(launch, "seeds_table", lambda runs: "")
    siblings: list[Any] = list(launch.run_seeds(load(tmp_path), [3, 4]))
    for seed, done in zip((3, 4), siblings, strict=True):
        again = load_table(tomllib.loads(done.loaded.source_text)).experiment
        assert (again.seed, again.name) == (seed, f"small-seed{seed}")
        assert again == done.loaded.experiment
    with pytest.raises(ConfigError, match="seed"):
        launch.run_seeds(load(tmp_path), [-1])


def test_tensorboard_gets_every_number_and_no_torch_is_imported(tmp_path: Path) -> None:
    code = """
import sys
from contextlib import nullcontext
from pathlib import Path
from slipstream.configs.feed import Event
from slipstream.configs.schema import TrackConfig
from slipstream.configs.track import make_trackers
[tracker] = make_trackers(TrackConfig(), Path(sys.argv[1]), run_id="r", settings={}, step=0)
row = {"step": 3, "time": 5.0, "loss": 0.25, "proof": {"max_lag": 1}, "version": "0.3"}
tracker.write([Event(kind="step", row=row)])
tracker.close()
heavy = {"torch", "transformers", "tensorflow", "ray", "vllm"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    [file] = (tmp_path / "tensorboard").iterdir()
    data = b"".join(RawEventFileLoader(str(file)).Load())
    assert b"loss" in data
    assert b"proof/max_lag" in data


def test_numbers_are_flattened_and_what_is_not_finite_is_left_out() -> None:
    row = {"step": 1, "loss": 0.5, "gap": float("nan"), "drops": {"stale": 2}, "status": "x"}
    found = scalars(Event(kind="evaluation", row=row))
    assert found == {"eval/loss": 0.5, "eval/drops/stale": 2.0}


def test_without_tracking_nothing_is_written(tmp_path: Path) -> None:
    config = load(tmp_path, track={"tensorboard": False}).experiment.track
    assert make_trackers(config, tmp_path, run_id="r", settings={}, step=0) == []

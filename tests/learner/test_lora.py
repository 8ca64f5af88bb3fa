"""LoRA: only adapters move and are published, exports are merged, and peft can read both."""

import json
import threading

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from slipstream.buffer.errors import ConfigError, CorruptData
from slipstream.buffer.records import Version
from slipstream.buffer.staleness import LivePath
from slipstream.kernels.adapters import merged
from slipstream.kernels.models import assign_weights, policy_weights, read_weights
from slipstream.learner import lora, shards
from slipstream.learner.checkpoint import ADAPTER, find_checkpoint
from slipstream.learner.config import LearnerConfig, LoraConfig, ObjectiveConfig, OptimizerConfig
from slipstream.learner.export import export
from slipstream.learner.policy import Policy, probe
from slipstream.learner.step import train_step
from transformers import AutoModelForCausalLM

RANK = LoraConfig(rank=4, alpha=6.0)
SETTINGS = LearnerConfig(
    lora=RANK,
    objective=ObjectiveConfig(entropy_coefficient=0.01),
    optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=1e9),
)


@pytest.fixture
def adapted(build_policy):
    """`adapted("float64")`: a model with adapters whose B is not zero any more."""

    def build(dtype="float64"):
        model = build_policy(dtype)
        lora.add_adapters(model, RANK, seed=5)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in lora.adapters(model).items():
                if "lora_B" in name:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(noise / 20)
        return model

    return build


def merged_copy(model, build_policy, dtype="float64"):
    """A plain model with the merged weights."""
    plain = build_policy(dtype)
    assign_weights(plain, lora.merged_weights(model))
    return plain


def train(model, groups):
    policy = Policy(model, SETTINGS.optimizer)
    train_step(
        policy, groups, step=1, held=Version(branch=0, step=0), config=SETTINGS,
        path=LivePath(0), max_staleness_steps=1.0,
    )  # fmt: skip
    return policy


def test_adapters_change_nothing_at_first_and_are_the_same_for_a_seed(build_policy):
    plain, states = build_policy(), []
    for _ in range(2):
        model = build_policy()
        torch.rand(3)
        lora.add_adapters(model, RANK, seed=5)
        states.append(lora.adapter_state(model))
        weights = lora.merged_weights(model)
        assert weights.keys() == policy_weights(plain).keys()
        assert all(torch.equal(weights[n], w) for n, w in policy_weights(plain).items())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_model_that_is_served_is_the_one_that_is_trained(adapted, build_policy):
    model = adapted()
    plain = merged_copy(model, build_policy)
    tokens = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = plain(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-9)
    with lora.merged(model):
        assert torch.equal(model(tokens).logits, expected)
    base = build_policy()(tokens).logits
    assert (expected - base).abs().max() > 0.01
    for name, weight in policy_weights(build_policy()).items():  # and W is as it was
        own = model.state_dict()
        assert torch.equal(
            own[name if name in own else name.replace("proj.", "proj.base_layer.")], weight
        )


def test_adapters_get_the_gradient_that_the_chain_rule_gives_and_nothing_else_moves(
    adapted, build_policy, make
):
    """With y = x (W + s B A)^T: dB = s dW A^T and dA = s B^T dW, dW that of the merged weight."""
    model, taken = adapted(), {}
    plain = merged_copy(model, build_policy)
    groups = make.groups(model=plain)
    full = Policy(plain, SETTINGS.optimizer)
    for policy, into in ((Policy(model, SETTINGS.optimizer), "ours"), (full, "full")):
        kept = taken.setdefault(into, {})

        def keep(learning_rate, grad_norm, kept=kept, parameters=policy.parameters):
            kept |= {name: parameter.grad.clone() for name, parameter in parameters.items()}

        policy.update = keep  # type: ignore[method-assign]
        train_step(
            policy, groups, step=1, held=Version(branch=0, step=0),
            config=SETTINGS, path=LivePath(0), max_staleness_steps=1.0,
        )  # fmt: skip
    assert all(".lora_" in name for name in taken["ours"])
    parameters, scale = lora.adapters(model), RANK.alpha / RANK.rank
    assert len(parameters) == 2 * 7 * 2
    for name, gradient in taken["ours"].items():
        where = name.partition(".lora_")[0]
        dw = taken["full"][f"{where}.weight"]
        a, b = (parameters[f"{where}.lora_{x}.default.weight"] for x in "AB")
        expected = scale * (dw @ a.T if "lora_B" in name else b.T @ dw)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_a_step_moves_the_adapters_alone_and_the_optimizer_knows_no_other(adapted, make):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    policy = train(model, make.groups())
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == set(lora.adapters(model))
    fields = {key.rpartition(":")[0] for key in policy.optimizer_state()} - {""}
    assert fields == moved


def test_bfloat16_serves_the_sum_rounded_once_and_moves_float32_adapters(
    adapted, build_policy, make
):
    model = adapted("bfloat16")
    assert {p.dtype for p in lora.adapters(model).values()} == {torch.float32}
    layer = model.model.layers[0].self_attn.q_proj
    train(model, make.groups())
    change = (RANK.alpha / RANK.rank) * layer.lora_B.default.weight @ layer.lora_A.default.weight
    expected = (layer.base_layer.weight.float() + change).bfloat16()
    served = Policy(model, SETTINGS.optimizer).weights()["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(served, expected)
    plain = merged_copy(model, build_policy, "bfloat16")
    assert torch.equal(probe(model)["logits"], probe(plain)["logits"])  # what an export must equal


def test_a_resumed_run_goes_on_bit_for_bit(make_spec, fake_buffer, run_loop, rows_of):
    spec = make_spec(steps=4)
    spec = spec.model_copy(update={"config": spec.config.model_copy(update={"lora": RANK})})
    run_loop(spec, fake_buffer())
    want = rows_of(spec.run_dir)
    found, _ = find_checkpoint(spec.run_dir / "checkpoints", (0, 2))
    resumed = spec.model_copy(
        update={"branch": 1, "branch_parents": {1: (0, 2)}, "resume_from": (0, 2)}
    )
    buffer = fake_buffer()
    torch.manual_seed(99)
    run_loop(resumed, buffer)
    assert buffer.published[0].version.digest == found.version.digest
    rows = rows_of(spec.run_dir)
    assert [rows[step]["loss"] for step in (3, 4)] == [want[step]["loss"] for step in (3, 4)]
    assert rows[4]["digest"] == want[4]["digest"]
    other = spec.config.model_copy(update={"lora": LoraConfig(rank=3)})
    changes = {"branch": 2, "resume_from": (1, 4), "config": other}
    with pytest.raises(CorruptData, match="another rank"):
        run_loop(resumed.model_copy(update=changes), fake_buffer())


@pytest.mark.parametrize("publish", ["adapter", "merged"])
def test_what_is_published_is_what_is_checkpointed_and_by_itself_the_adapters_alone(
    make_spec, fake_buffer, run_loop, rows_of, publish
):
    own = RANK.model_copy(update={"publish": publish})
    spec = make_spec(steps=2, dtype="float32")
    spec = spec.model_copy(update={"config": spec.config.model_copy(update={"lora": own})})
    buffer = fake_buffer()
    model = run_loop(spec, buffer).policy.model
    alone = sum(parameter.nbytes for parameter in lora.adapters(model).values())
    whole = sum(weight.nbytes for weight in lora.base_weights(model).values())
    bases = {manifest.base for manifest in buffer.published}
    assert len(bases) == 1
    assert (None in bases) == (publish == "merged")
    expected = alone if publish == "adapter" else whole
    sizes = [sum(shard.num_bytes for shard in each.shards) for each in buffer.published]
    assert all(expected < size < expected + 10_000 for size in sizes)
    assert alone + 10_000 < whole
    assert rows_of(spec.run_dir)[2]["published_bytes"] == sizes[-1]
    saved = find_checkpoint(spec.run_dir / "checkpoints")[0].folder / "weights.safetensors"
    kept = load_file(saved)
    newest = buffer.published[-1]
    served = dict(merged(read_weights([shard.path for shard in newest.files])))
    assert kept.keys() == served.keys()
    assert all(torch.equal(served[name], weight) for name, weight in kept.items())


def test_training_goes_on_while_merged_weights_are_written(
    make_spec, fake_buffer, run_loop, monkeypatch
):
    plain = shards.fill_file
    threads: dict[tuple[str, str], threading.Thread] = {}

    def fill(path, parts, extra={}):  # noqa: B006
        threads[path.parent.name, path.name] = threading.current_thread()
        plain(path, parts, extra)

    monkeypatch.setattr(shards, "fill_file", fill)
    spec = make_spec(steps=2)
    spec = spec.model_copy(update={"config": spec.config.model_copy(update={"lora": RANK})})
    training = []
    monkeypatch.setattr(
        Policy, "update", spied(Policy.update, lambda: training.append(threading.current_thread()))
    )
    run_loop(spec, fake_buffer())
    wrote = threads["step-000002.b0", "weights.safetensors"]
    assert len(set(training)) == 1
    assert wrote not in training
    assert threads["step-000002.b0", "optimizer.safetensors"] is wrote


def spied(plain, tell):
    """A method that tells of each call."""

    def run(*arguments):
        tell()
        return plain(*arguments)

    return run


def test_an_export_holds_the_merged_model_and_the_adapter_as_peft_reads_it(
    make_spec, fake_buffer, run_loop, build_policy, tmp_path
):
    base = tmp_path / "base"
    spec = make_spec(steps=2, dtype="float32")
    build_policy("float32").save_pretrained(str(base))
    for file in spec.model_dir.glob("*token*"):
        (base / file.name).write_bytes(file.read_bytes())
    config = spec.config.model_copy(update={"lora": RANK})
    spec = spec.model_copy(update={"config": config, "model_dir": base})
    run_loop(spec, fake_buffer())
    (spec.run_dir / "resolved.json").write_text(
        json.dumps({"model": str(base), "learner": {"lora": RANK.model_dump(mode="json")}})
    )
    out = tmp_path / "out"
    export(spec.run_dir, out)
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(str(out))(tokens).logits
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(base)), str(out / "adapter")
    )
    torch.testing.assert_close(model(tokens).logits, whole, rtol=0, atol=1e-5)
    assert not np.allclose(whole.detach(), build_policy("float32")(tokens).logits.detach())
    saved = load_file(find_checkpoint(spec.run_dir / "checkpoints")[0].folder / ADAPTER)
    assert set(saved) == set(load_file(out / "adapter" / ADAPTER))


def test_what_cannot_work_is_refused_with_the_remedy(build_policy):
    with pytest.raises(ConfigError, match=r"learner\.lora\.targets .*q_proj"):
        lora.add_adapters(build_policy(), LoraConfig(rank=2, targets=("nowhere",)), seed=0)
    with pytest.raises(ValidationError, match='use "checkpoint"'):
        LearnerConfig(lora=RANK, activations="stream")
    with pytest.raises(ValidationError, match="leave it out"):
        LearnerConfig(lora=LoraConfig(rank=2, targets=("lm_head",)))

"""Export: what appears has been reloaded elsewhere and is the policy that was trained."""

import json
import platform
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from slipstream.buffer.errors import ConfigError, CorruptData, TrainingFailed
from slipstream.learner import export as module
from slipstream.learner.checkpoint import MANIFEST, complete_folders, find_checkpoint
from slipstream.learner.export import export
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def run_dir(make_spec, fake_buffer, run_loop):
    spec = make_spec(steps=2, dtype="float32")
    run_loop(spec, fake_buffer())
    evaluation = {"reward_mean": 0.25, "ci95_low": 0.2, "ci95_high": 0.3, "prompts": 512}
    lines = [json.dumps({"step": step} | evaluation) + "\n" for step in (0, 2)]
    (spec.run_dir / "eval.jsonl").write_text("".join(lines) + '{"step": 3, "cut')
    (spec.run_dir / "run.json").write_text('{"name": "mine", "versions": {"torch": "2.13"}}')
    (spec.run_dir / "resolved.json").write_text(
        '{"model": "builtin:tiny", "prompts": {"source": "reasoning_gym", "task": "chain_sum"}}'
    )
    return spec.run_dir


def command(monkeypatch, *arguments) -> int:
    """`python -m slipstream.learner.export ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    return module.main()


def test_the_exported_folder_loads_as_the_live_policy_and_tells_its_lineage(
    run_dir, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert command(monkeypatch, run_dir, out) == 0
    assert capsys.readouterr().out.startswith(f"ok: {out} holds step 2 of branch 0")
    lineage = json.loads((out / "slipstream.json").read_text())
    assert lineage["max_logit_difference"] <= 1e-5
    assert lineage["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(str(out))
    assert model.dtype == torch.float32
    weights = load_file(find_checkpoint(run_dir / "checkpoints")[0].folder / "weights.safetensors")
    assert all(torch.equal(model.get_parameter(name), w) for name, w in weights.items())
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True
    )
    assert chat["input_ids"] == [2, 4, 3]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1]
    card = (out / "README.md").read_text()
    for words in ("# mine", "chain_sum", "| builtin:tiny |", "| 0, 2 |", "| 2 | 0.250 |", "2.13"):
        assert words in card
    assert not list(tmp_path.glob(".out*"))


def assert_rounded(folder, dtype: torch.dtype, weights) -> None:
    """Config, file and every weight are of the dtype, each weight the nearest one."""
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(model.get_parameter(n), w.to(dtype)) for n, w in weights.items())


def test_sampling_settings_of_the_models_own_generation_config_are_exported(run_dir, tmp_path):
    started_from = find_checkpoint(run_dir / "checkpoints")[0].info["model_dir"]
    copy = shutil.copytree(started_from, run_dir / "model")
    (copy / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    module.export(run_dir, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.6, True)
    assert saved["eos_token_id"] == [1], "config.json names it"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_in_another_dtype_is_the_policy_rounded_once(
    run_dir, tmp_path, monkeypatch, capsys, record_property, dtype
):
    out = tmp_path / "out"
    assert command(monkeypatch, run_dir, out, "--dtype", dtype) == 0
    weights = load_file(find_checkpoint(run_dir / "checkpoints")[0].folder / "weights.safetensors")
    assert_rounded(out, getattr(torch, dtype), weights)
    lineage = json.loads((out / "slipstream.json").read_text())
    record_property("check", lineage["check"])
    assert lineage["check"] in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert f"| Dtype | {dtype} |" in card
    assert lineage["check"] in card
    gap, unit = lineage["max_logprob_difference"], torch.finfo(getattr(torch, dtype)).eps / 2
    assert 1e-2 * unit < gap < 1e2 * unit  # of the size that the dtype rounds by
    assert "one more rounding" in lineage["check"]


def test_a_policy_trained_in_bfloat16_loses_nothing_in_float32_and_small_weights_in_float16(
    make_spec, fake_buffer, run_loop, tmp_path
):
    spec = make_spec(steps=2, dtype="bfloat16")
    run_loop(spec, fake_buffer())
    checkpoint, _ = find_checkpoint(spec.run_dir / "checkpoints")
    weights = load_file(checkpoint.folder / "weights.safetensors")
    for dtype in ("float32", "float16"):
        out = tmp_path / str(dtype)
        done = export(spec.run_dir, out, dtype=dtype)
        assert done.max_logit_difference <= 1e-5
        assert_rounded(out, getattr(torch, done.dtype), weights)


def test_dtypes_that_cannot_be_exported_are_refused_with_the_choices(run_dir, tmp_path):
    with pytest.raises(ConfigError, match="choose bfloat16, float16, float32"):
        export(run_dir, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match=r"norm\.weight holds 7e\+04, and float16 ends at 6\.55"):
        module._check_range("norm.weight", torch.tensor([1.0, -7e4]), "float16")
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_going_on_is_exported_from_its_newest_checkpoint(
    make_spec, fake_buffer, run_loop, tmp_path
):
    spec, buffer, done = make_spec(steps=4, dtype="float32"), fake_buffer(), []

    def take(step):
        if step == 4:
            done.append(export(spec.run_dir, tmp_path / "out"))

    buffer.on_take = take
    run_loop(spec, buffer)
    assert done[0].step in (0, 2)  # that of step 2 may still be written
    assert done[0].max_logit_difference <= 1e-5


def test_a_checkpoint_that_its_run_removes_meanwhile_is_exported_all_the_same(
    run_dir, tmp_path, monkeypatch
):
    root, read = run_dir / "checkpoints", module.read_weights
    # Of exports that were killed: one here; of the other only its own host can know.
    left, elsewhere = (
        root / f".step-000000.b0.export-{host}@999999999" for host in (platform.node(), "elsewhere")
    )
    left.mkdir()
    elsewhere.mkdir()

    def removing(paths):
        for folder in complete_folders(root):
            shutil.rmtree(folder)
        return read(paths)

    monkeypatch.setattr(module, "read_weights", removing)
    assert export(run_dir, tmp_path / "out").step == 2
    assert list(root.iterdir()) == [elsewhere]


@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_that_is_gone_before_it_is_opened_is_replaced_by_a_newer_one(
    run_dir, tmp_path, monkeypatch, last
):
    root, found = run_dir / "checkpoints", module.find_checkpoint
    older = found(root, (0, 0))

    def finding(root):
        (older[0].folder / MANIFEST).unlink(missing_ok=True)
        monkeypatch.setattr(module, "find_checkpoint", finding if last else found)
        return older

    monkeypatch.setattr(module, "find_checkpoint", finding)
    if last:
        with pytest.raises(CorruptData, match="faster than they are opened"):
            export(run_dir, tmp_path / "out")
    else:
        assert export(run_dir, tmp_path / "out").step == 2
    assert [path.name for path in root.glob(".*")] == []


@pytest.mark.parametrize(("fault", "dtype"), [("weight", None), ("config", "bfloat16")])
def test_a_planted_fault_is_caught_and_nothing_is_exported(
    run_dir, tmp_path, monkeypatch, fault, dtype
):
    read, empty = module.read_weights, module.empty_model

    def planted_weight(paths):
        weights = read(paths)
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.02
        return weights

    def planted_config(*arguments):
        model = empty(*arguments)
        model.config.rope_parameters["rope_theta"] /= 2
        return model

    if fault == "weight":
        monkeypatch.setattr(module, "read_weights", planted_weight)
    else:
        monkeypatch.setattr(module, "empty_model", planted_config)
    words = {
        "weight": r"\.down_proj\.weight.* are not the",
        "config": "differ from the live policy",
    }
    with pytest.raises(TrainingFailed, match=words[fault]):
        export(run_dir, tmp_path / "out", dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "weights"]


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(run_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    found = {"logits": 0.0, "logprobs": 0.0, "check": ""}
    monkeypatch.setattr(module, "verify", lambda *given: found)
    first = find_checkpoint(run_dir / "checkpoints", (0, 0))[0]
    assert export(run_dir, out, first.folder).step == 0
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(run_dir, out)
    assert command(monkeypatch, run_dir, out) == 2
    assert "is not an empty folder; choose another" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path):
    newest = find_checkpoint(run_dir / "checkpoints")[0].folder
    weights = load_file(newest / "weights.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, newest / "weights.safetensors")
    with pytest.raises(CorruptData, match="was altered"):
        export(run_dir, tmp_path / "out", newest)

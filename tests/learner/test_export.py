"""Export: what appears has been reloaded elsewhere and is the policy that was trained."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from slipstream.buffer.errors import ConfigError, CorruptData, TrainingFailed
from slipstream.learner import export as module
from slipstream.learner.checkpoint import find_checkpoint
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


def test_a_planted_wrong_weight_is_caught_and_nothing_is_exported(run_dir, tmp_path, monkeypatch):
    plain = module.read_weights

    def planted(paths):
        weights = plain(paths)
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
        return weights

    monkeypatch.setattr(module, "read_weights", planted)
    with pytest.raises(TrainingFailed, match="differ from the live policy's by"):
        export(run_dir, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "weights"]


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(run_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(module, "verify", lambda folder, probe: 0.0)
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

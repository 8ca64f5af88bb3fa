"""`plan --deep`: a learner rank's step without data, against the closed form and the device."""

import json
import sys
from pathlib import Path

import pytest
import torch
from slipstream.buffer.errors import ConfigError
from slipstream.configs import cli
from slipstream.configs.deep import dry_run, require_fit, sentences
from slipstream.configs.load import load_experiment
from slipstream.configs.models import check_folder, shape_dir
from slipstream.configs.rank_memory import rank_peak
from slipstream.configs.sizes import model_size
from slipstream.learner.dry import Ledger
from torch._subclasses.fake_tensor import FakeTensorMode

RECIPES = ["qwen2.5-1.5b-1gpu", "7b-8gpu", "32b-4node", "70b-lora-8gpu"]
KINDS = ("parameters", "gradients", "optimizer", "activations")


def estimate(experiment) -> int:
    size = model_size(experiment.model)
    assert size is not None
    return rank_peak(experiment, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_fits_its_device_and_the_plan_without_torch_agrees(name, record_property):
    experiment = load_experiment(name, []).experiment
    found = dry_run(experiment)
    record_property("peak_gib", round(found["peak_bytes"] / 2**30, 2))
    record_property("estimate_gib", round(estimate(experiment) / 2**30, 2))
    require_fit(experiment, found)
    assert sum(found[kind] for kind in KINDS) == found["peak_bytes"]
    assert estimate(experiment) == pytest.approx(found["peak_bytes"], rel=0.1)


def test_a_rank_of_two_is_counted_by_kind_and_refused_above_what_is_stated(
    capsys, monkeypatch, tmp_path
):
    shape = {
        "model_type": "llama", "vocab_size": 16_384, "hidden_size": 1024, "num_hidden_layers": 3,
        "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    given = [
        f"model={tmp_path}", "dtype=bfloat16", "cluster.learner_ranks=2", "learner.packed=true",
        "learner.activations=checkpoint", "learner.micro_batch_tokens=2048",
    ]  # fmt: skip
    experiment = load_experiment("quickstart", given).experiment
    found = dry_run(experiment)
    parameters = 2 * 16_384 * 1024 + 3 * (1024**2 * 2.5 + 3 * 4096 * 1024 + 2 * 1024) + 1024
    # Of each parameter: 2 bytes, its gradient in 2 and 4, its master and two moments in 4 each.
    assert found["peak_bytes"] >= parameters * 20 / 2
    assert found["optimizer"] == pytest.approx(parameters * 12 / 2, rel=0.01)
    assert sum(found[kind] for kind in KINDS) == found["peak_bytes"]
    assert estimate(experiment) == pytest.approx(found["peak_bytes"], rel=0.1)
    require_fit(experiment, found)  # nothing is stated
    small = load_experiment("quickstart", [*given, "cluster.gpu_memory_gib=0.5"]).experiment
    with pytest.raises(ConfigError, match=r"more than cluster\.gpu_memory_gib = 0.5; most of it"):
        require_fit(small, found)
    assert "with 2 ranks" in next(sentences(small, found))
    monkeypatch.setattr("slipstream.configs.deep.dry_run", lambda _: found)
    monkeypatch.setattr(
        sys, "argv", ["slipstream", "plan", "--deep", "quickstart", "cluster.gpu_memory_gib=0.5"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "optimizer hold" in said.out
    assert "gpu_memory_gib = 0.5" in said.err


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_reference_of_a_kl_term_is_counted_as_parameters(tmp_path, ranks):
    shape = {
        "model_type": "llama", "vocab_size": 16_384, "hidden_size": 512, "num_hidden_layers": 2,
        "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    given = [
        f"model={tmp_path}", "dtype=bfloat16", f"cluster.learner_ranks={ranks}",
        "learner.packed=true", "learner.micro_batch_tokens=512",
        "learner.objective.kl_coefficient=0.1",
    ]  # fmt: skip
    experiment = load_experiment("quickstart", given).experiment
    size = model_size(str(tmp_path))
    assert size is not None
    found = dry_run(experiment)
    assert found["parameters"] >= 2 * size.num_parameters * 2 / ranks
    assert estimate(experiment) == pytest.approx(found["peak_bytes"], rel=0.1)


def test_the_ledger_names_storages_afterwards_and_counts_what_died():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        with ledger.stage("first", "activations"):
            kept = torch.empty(1024)
            lost = torch.empty(4096)
            del lost
            view = kept[:10]  # the same storage
            small = torch.empty(1)  # a block of 512 bytes
        ledger.name(kept, "gradients")
        with ledger.stage("second", "optimizer"):
            later = torch.empty(1024)
    assert (view.shape, small.shape, later.shape) == ((10,), (1,), (1024,))
    peak = ledger.peak()
    assert (peak["peak_bytes"], peak["stage"]) == (4096 + 16384, "first")
    assert (peak["gradients"], peak["activations"]) == (4096, 16384)


def test_a_model_that_is_only_known_by_its_shape_is_planned_and_cannot_be_run(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name = "Qwen/Qwen2.5-7B"
    size = model_size(name)
    assert size is not None
    assert size.num_parameters == pytest.approx(7.616e9, rel=1e-3)  # as published
    assert shape_dir("Qwen/none") is None
    with pytest.raises(ConfigError, match=f"hf download {name} --local-dir {name}"):
        check_folder(Path(name), name)

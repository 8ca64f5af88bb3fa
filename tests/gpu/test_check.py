"""`make gpu-check` without a GPU: its set-up on tensors that only claim to be on one, and what its
certificate allows."""

import json
from contextlib import contextmanager
from importlib import metadata

import pytest
import torch
from slipstream.configs.load import load_experiment
from slipstream.learner import dry
from slipstream.rollout.engines.vllm_law import certificate_file, law_check, law_proved
from torch._subclasses.fake_tensor import FakeTensorMode

from . import check

NGRAM = check.DRAFTERS["ngram"]


@contextmanager
def fake():
    """Inside, tensors have no data, and what is chosen by their device is chosen as on a GPU. Torch
    without CUDA aborts when autograd meets a device that is not there, so it is not named."""
    with dry.as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True) as mode, dry.Ledger():
        yield mode


@pytest.mark.parametrize("name", ["plain", "bias", "bfloat16"])
def test_kernels_are_given_and_give_back_what_the_definition_does(name):
    case = check.make_case(**{"vocabulary": 301, **check.CASES[name]})
    with fake():
        found = check.results(case, "cpu")
    ours, theirs = (
        {name: (values.shape, values.dtype) for name, values in each.items()} for each in found
    )
    assert ours == theirs


def test_the_step_that_is_measured_runs(tmp_path):
    spec = check.dry_spec(tmp_path)
    batch = dry.micro_batch(spec, torch.float32)
    with fake() as mode:
        without_data = dry._fake(batch, mode.from_tensor)
        policy = check.one_step(spec, without_data, "cpu", dry._NoSums())
    assert policy.optimizer.state
    assert all(master.grad is None for master in policy.masters.values())


def test_all_inputs_are_put_on_the_device(tmp_path, monkeypatch):
    def to(self, *args):
        """Torch's own looks for the device itself, before anything is dispatched."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args)  # pyright: ignore
        return torch.ops.aten._to_copy(self, device=device, dtype=dtype)

    case, spec = check.make_case(vocabulary=301, bias=True), check.dry_spec(tmp_path)
    batch = dry.micro_batch(spec, torch.float32)
    monkeypatch.setattr(torch.Tensor, "to", to)
    with FakeTensorMode(allow_non_fake_inputs=True):
        case = check.on(case, "cuda")
        model, batch = check.inputs(spec, batch, "cuda")
    for value in (case.hidden, case.targets, *case.terms.values(), *case.head[:3], batch.weights_T,
                  batch.layout.input_ids_BL, *model.parameters(), *model.buffers()):  # fmt: skip
        assert value is None or value.is_cuda


def test_the_run_is_an_experiment_that_can_be_started(tmp_path):
    experiment = load_experiment(str(check.write_experiment(tmp_path)), []).experiment
    assert (experiment.learner.steps, experiment.rollout.engine) == (20, "vllm")
    assert experiment.learner.device == "cuda"


def test_every_check_has_a_name_of_its_own_and_every_drafter_a_law():
    names = [name for name, _ in check.checks()]
    assert len(set(names)) == len(names) == 10
    assert {law_check(config) for config in check.DRAFTERS.values()} <= set(names)


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main() == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not certificate_file().exists()


def test_a_check_that_fails_is_recorded_with_its_reason():
    def fails(_):
        print("measured gap 3")
        raise AssertionError("too far")

    found = check.tried(fails)
    assert (found["ok"], found["measured"]) == (False, ["gap 3"])
    assert "too far" in found["reason"]


def test_the_certificate_says_what_each_check_found_and_is_the_one_that_is_read(
    monkeypatch, tmp_path
):
    async def proved():
        return {"runner": "v2"}

    def fails(_):
        raise AssertionError("too much")

    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(metadata, "version", lambda _: "0.32.0")
    found = [(law_check(NGRAM), lambda _: proved()), ("memory", fails)]
    monkeypatch.setattr(check, "checks", lambda: iter(found))
    assert check.main() == 1
    told = json.loads(certificate_file().read_text())
    assert (told["ok"], told["checks"]["memory"]["ok"]) == (False, False)
    assert "too much" in told["checks"]["memory"]["reason"]
    assert law_proved(NGRAM, "H100", "v2")
    assert not law_proved(NGRAM, "H100", "v1")


def test_drafts_are_allowed_by_a_certificate_of_this_vllm_gpu_and_runner_alone(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    versions = {"vllm": "0.32.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    passed = {"ok": True, "runner": "v2", "measured": ["law 102500"]}
    told = {"vllm": "0.32.0", "gpu": "H100", "ok": False,
            "checks": {law_check(NGRAM): passed, "memory": {"ok": False}}}  # fmt: skip

    def proved(gpu: str | None = "H100", runner: str | None = "v2", config=NGRAM, **changes):
        certificate_file().write_text(json.dumps({**told, **changes}))
        return law_proved(config, gpu, runner)

    assert not law_proved(NGRAM)  # there is none
    assert proved()
    assert proved(gpu=None, runner=None)
    assert proved(config={**NGRAM, "num_speculative_tokens": 7})
    assert not proved(config={**NGRAM, "rejection_sample_method": "synthetic"})
    assert not proved(gpu="A100")
    assert not proved(gpu="")
    assert not proved(vllm="0.32.1")
    assert not proved(runner="v1")
    assert not proved(config=check.DRAFTERS["siblings"])
    assert not proved(checks={law_check(NGRAM): {**passed, "ok": False}})
    assert not proved(checks={law_check(NGRAM): {"ok": True}}, runner=None)
    given = ["rollout.engine=vllm", "rollout.vllm.speculative_config={method='ngram'}"]
    certificate_file().write_text(json.dumps(told))
    load_experiment("quickstart", given)  # evaluations may be drawn

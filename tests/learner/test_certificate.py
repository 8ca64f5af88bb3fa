"""A fault planted in how log-probs are recorded is named, each kind by its name.

The faults are planted by what an engine would do, written here a second time.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from slipstream.buffer.records import Message, SamplingParams, Version, VersionSpan
from slipstream.kernels.models import load_tokenizer, policy_weights, render_prompt
from slipstream.learner.certificate import BANDS, CAUSES, certify, leaves_band
from transformers import PreTrainedModel

OLD, HELD = (Version(branch=0, step=step) for step in (3, 4))
MESSAGES = (Message(role="user", content="how much is 12 + 34?"),)
OUTSIDE = {"logprob_gap_max": 9.9, "logprob_gap_mean": 0.5, "logprob_gap_kl": 0.1}
SAMPLING = SamplingParams(temperature=0.8, top_k=20)
ANSWER, SWAP = 14, 4
"""Tokens of an answer, and of them those that the older version wrote when there are two."""


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: list[int], num_prompt: int) -> torch.Tensor:
    """[N, V] that predict what follows the prompt."""
    return model(torch.tensor([ids])).logits[0, num_prompt - 1 : -1]


def picked(logits: torch.Tensor, ids: list[int]) -> np.ndarray:
    answer = torch.tensor(ids[len(ids) - len(logits) :])[:, None]
    return logits.log_softmax(-1).gather(1, answer)[:, 0].detach().float().numpy()


@torch.no_grad()
def answers(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The prompt and what the model writes, by the law that is recorded."""
    ids = list(prompt)
    for _ in range(ANSWER):
        kept = (model(torch.tensor([ids])).logits[0, -1] / 0.8).topk(20)
        ids.append(int(kept.indices[torch.multinomial(kept.values.softmax(-1), 1)]))
    return ids


class Plant:
    """Two versions of a policy, and how an engine with a fault scores `ids`."""

    def __init__(self, held: PreTrainedModel, old: PreTrainedModel, tokenizer) -> None:
        self.held, self.old, self.pad = held, old, tokenizer.pad_token_id

    def none(self, ids, n):
        return picked(logits_of(self.held, ids, n) / 0.8, ids)

    def temperature(self, ids, n):
        return picked(logits_of(self.held, ids, n), ids)

    def truncation_law(self, ids, n):
        logits = logits_of(self.held, ids, n) / 0.8
        return picked(logits.where(logits >= logits.topk(20)[0][:, -1:], -torch.inf), ids)

    def dtype(self, ids, n):
        return picked(logits_of(copy.deepcopy(self.held).bfloat16(), ids, n).float() / 0.8, ids)

    def tokenisation(self, ids, n):
        return picked(logits_of(self.held, [1, *ids], n + 1) / 0.8, ids)

    def padding(self, ids, n):
        return picked(logits_of(self.held, [self.pad] * (-n % 8) + ids, n + -n % 8) / 0.8, ids)

    def weight_version(self, ids, n):
        return picked(logits_of(self.old, ids, n) / 0.8, ids)

    @torch.no_grad()
    def over_old_keys(self, ids, n, cut):
        """What the held version writes from `cut` on, token by token, over the other's keys."""
        past = self.old(torch.tensor([ids[: cut - 1]]), use_cache=True).past_key_values
        rows = []
        for place in range(cut - 1, len(ids) - 1):
            done = self.held(torch.tensor([[ids[place]]]), past_key_values=past, use_cache=True)
            rows.append(done.logits[0, 0])
            past = done.past_key_values
        older = logits_of(self.old, ids[:cut], n) if cut > n else torch.empty(0, len(rows[0]))
        return picked(torch.cat([older, torch.stack(rows)]) / 0.8, ids)

    def kv_mixture(self, ids, n):
        return self.over_old_keys(ids, n, n + SWAP)

    def prefix_cache_staleness(self, ids, n):
        return self.over_old_keys(ids, n, n)


@pytest.fixture
def make_case(make, model_dir: Path, build_policy, tmp_path: Path) -> Callable:
    """`make_case("padding")` -> what `certify` says of a batch with that fault."""

    def case(fault: str, metrics=OUTSIDE, noise: float = 0.0, **more) -> str:
        tokenizer = load_tokenizer(model_dir)
        held, old = build_policy("float32", 1), build_policy("float32", 1)
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.mul_(1.05)
        files = {version: tmp_path / f"{version}.safetensors" for version in (OLD, HELD)}
        for version, model in ((OLD, old), (HELD, held)):
            save_file({n: w.clone() for n, w in policy_weights(model).items()}, files[version])
        plant, random = Plant(held, old, tokenizer), np.random.default_rng(0)
        groups = []
        for uid in range(3):
            ids = answers(held, render_prompt(tokenizer, MESSAGES))
            n = len(ids) - ANSWER
            spans = [VersionSpan(version=HELD, length=ANSWER)]
            if fault == "kv_mixture":
                spans = [VersionSpan(version=OLD, length=SWAP),
                         VersionSpan(version=HELD, length=ANSWER - SWAP)]  # fmt: skip
            recorded = getattr(plant, fault)(ids, n)
            recorded = recorded + noise * random.standard_normal(ANSWER).astype(np.float32)
            trajectory = make.trajectory(
                uid,
                0,
                random,
                num_prompt=n,
                num_written=ANSWER,
                token_ids=np.array(ids, np.int32),
                policy_mask=np.arange(len(ids)) >= n,
                behaviour_logprobs=recorded,
                versions=tuple(spans),
                kv_version_min=tuple(spans),
                sampling=SAMPLING,
            )
            group = make.group(uid, [trajectory])
            asked = msgspec.structs.replace(group.prompt, messages=MESSAGES)
            groups.append(msgspec.structs.replace(group, prompt=asked))
        return certify(
            metrics, groups, HELD, files=files, model_dir=model_dir, dtype="float32",
            kept_law=False, band=BANDS["float32"], **more,
        )  # fmt: skip

    torch.manual_seed(0)
    return case


@pytest.mark.parametrize("cause", CAUSES)
def test_a_planted_fault_is_named(make_case: Callable, cause: str) -> None:
    fault = cause.lower().replace(" ", "_").replace("-", "_")
    said = make_case(fault)
    assert said.startswith(f"{cause}: "), said
    assert said.endswith("log-prob gap max 9.9e+00 is above 1.0e-03")


def test_a_gap_of_no_known_cause_is_called_unknown(make_case: Callable) -> None:
    assert make_case("none", noise=0.3).startswith("unknown: ")


def test_samples_that_agree_alone_accuse_the_rows_they_were_scored_in(make_case: Callable) -> None:
    assert make_case("none").startswith("padding: scored alone, every sample agrees")


@pytest.mark.parametrize("seen", ["some samples", "some tokens", "merged weights"])
def test_nothing_is_accused_when_the_guilty_may_not_have_been_looked_at(
    make_case: Callable, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seen == "some samples":
        monkeypatch.setattr("slipstream.learner.certificate.MAX_LOOKED_AT", 1)
    if seen == "some tokens":
        monkeypatch.setattr("slipstream.learner.certificate.MAX_TOKENS", ANSWER - 1)
    said = make_case("none", merged=seen == "merged weights")
    assert said.startswith("unknown: scored alone, the samples looked at agree")


def test_all_groups_of_a_step_are_certified_also_when_it_was_trained_in_parts(
    make_spec, run_loop, fake_buffer, monkeypatch
) -> None:
    seen = []

    def noted(_, groups, *__, **___):
        seen.append(len(groups))
        return ""

    monkeypatch.setattr("slipstream.learner.trainer.certify", noted)
    spec, buffer = make_spec(steps=2), fake_buffer()
    config = spec.config.model_copy(update={"stream": True})
    run_loop(spec.model_copy(update={"config": config}), buffer)
    assert buffer.parts == 2
    assert seen == [2, 2]


def test_inside_the_band_nothing_is_asked(make_case: Callable) -> None:
    inside = {"logprob_gap_max": 9e-4, "logprob_gap_mean": 9e-5, "logprob_gap_kl": None}
    assert make_case("temperature", metrics=inside) == ""
    assert leaves_band(inside | {"logprob_gap_kl": float("nan")}, BANDS["float32"])


def test_a_step_outside_its_band_says_why_and_goes_on(make_spec, run_loop, fake_buffer) -> None:
    spec = make_spec(steps=2, dtype="float32")
    run_loop(spec, fake_buffer())
    rows = [json.loads(line) for line in (spec.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    # The fixture's log-probs are random, and stamped with the version before the first step.
    assert rows[0]["certificate"].startswith("unknown: none of")
    assert rows[0]["logprob_gap_kl"] > BANDS["float32"].kl
    assert rows[1]["logprob_gap_tokens"] == 0
    assert rows[1]["certificate"] == ""


def test_the_band_is_that_of_what_the_engine_computes_in(
    make_spec, run_loop, fake_buffer, monkeypatch
) -> None:
    bands = []

    def noted(*_, band, **__):
        bands.append(band)
        return ""

    monkeypatch.setattr("slipstream.learner.trainer.certify", noted)
    run_loop(make_spec(steps=1, dtype="float32", engine_dtype="bfloat16"), fake_buffer())
    assert bands == [BANDS["bfloat16"]]

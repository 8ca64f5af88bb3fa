"""The warm start: it learns, from the assistant's tokens alone, the same way every time."""

import json

import numpy as np
import pytest
import torch
from slipstream.buffer.errors import ConfigError, TrainingFailed
from slipstream.kernels.models import load_tokenizer, render_prompt
from slipstream.learner.config import SftConfig
from slipstream.learner.policy import score
from slipstream.learner.sft import collate, read_examples, run_sft

CONFIG = SftConfig(batch_size=8, epochs=6, learning_rate=1e-2, warmup_steps=2, threads=1)


def write(path, pairs):
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def examples(tmp_path, model_dir):
    pairs = [(f"{a}+{b}=", str(a + b)) for a in range(8) for b in range(8)]
    return read_examples(write(tmp_path / "sft.jsonl", pairs), load_tokenizer(model_dir))


def test_examples_are_the_rendered_prompt_then_the_answer_then_the_end(
    tmp_path, model_dir, examples
):
    tokenizer = load_tokenizer(model_dir)
    example = examples[9]  # 1 + 1
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "1+1="}])
    assert example.token_ids.tolist()[: example.num_prompt] == prompt
    assert tokenizer.decode(example.token_ids[example.num_prompt :]) == "2<|end|>"


def test_loss_and_gradient_come_from_assistant_tokens_alone(examples, build_policy):
    model, batch = build_policy(), examples[5:9]
    rows = collate(batch, torch.float64)
    assert rows.layout.targets_T.tolist() == [
        int(t) for e in batch for t in e.token_ids[e.num_prompt :]
    ]
    got = -score(model, rows)[0].mean()
    terms = []
    for e in batch:
        logits = model(torch.from_numpy(e.token_ids)[None]).logits[0]
        picked = logits.log_softmax(-1)[np.arange(len(e.token_ids) - 1), e.token_ids[1:]]
        terms.append(picked[e.num_prompt - 1 :])
    assert got.item() == pytest.approx(-torch.cat(terms).mean().item(), abs=1e-9)


def test_the_loss_falls_and_progress_is_reported(examples, build_policy):
    rows = []
    final = run_sft(build_policy("float32"), examples, CONFIG, seed=0, report=rows.append)
    assert rows[0]["loss"] > 3
    assert final < 2
    assert [row["update"] for row in rows] == [1, 10, 20, 30, 40, 48]
    assert {"updates", "loss", "learning_rate", "tokens_per_s", "time"} <= rows[-1].keys()


def test_equal_arguments_give_equal_weights_and_micro_batches_change_none(examples, build_policy):
    results = []
    for seed, micro in ((0, 16_384), (0, 16_384), (0, 20), (1, 16_384)):
        model = build_policy()
        run_sft(model, examples[:16], CONFIG, seed=seed, micro_batch_tokens=micro)
        results.append(model.model.embed_tokens.weight.detach())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-6)
    assert not torch.equal(results[0], results[3])


def test_every_epoch_sees_every_example_once(examples):
    from slipstream.learner.sft import _batches

    batches = list(_batches(examples, CONFIG, seed=0))
    per_epoch = len(examples) // CONFIG.batch_size
    for epoch in range(CONFIG.epochs):
        seen = [id(e) for b in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for e in b]
        assert sorted(seen) == sorted(map(id, examples))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ('{"prompt": "a"}', "line 2: KeyError"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the assistant's"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "at least two messages"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, model_dir, line, words):
    path = write(tmp_path / "sft.jsonl", [("a", "b")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=words):
        read_examples(path, load_tokenizer(model_dir))


def test_no_file_and_no_examples_are_errors(tmp_path, model_dir):
    tokenizer = load_tokenizer(model_dir)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no examples"):
        read_examples(tmp_path / "empty.jsonl", tokenizer)


def test_a_loss_that_is_not_finite_names_the_update(examples, build_policy):
    model = build_policy("float32")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(TrainingFailed, match=r"warm start, update 1: loss nan"):
        run_sft(model, examples, CONFIG, seed=0)

"""Model folders: equal starts, one name per weight, and words for every broken file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from slipstream.buffer.records import Message
from slipstream.kernels.models import (
    ModelError,
    assign_weights,
    empty_model,
    end_token_ids,
    load_policy,
    load_tokenizer,
    policy_weights,
    read_weights,
    render_prompt,
    render_prompts,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TOKENS = torch.arange(12)[None] % 16


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        eos_token_id=1,
    ).save_pretrained(str(tmp_path))
    names = ["<pad>", "<end>", "<user>", "<assistant>", *"abcdefghij "]
    core = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
    ).save_pretrained(str(tmp_path))
    return tmp_path


def test_runs_of_one_seed_start_equal_in_every_dtype(model_dir):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    single, double = load_policy(model_dir, "float32", 3), load_policy(model_dir, "float64", 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert double.dtype == torch.float64
    for name, weight in policy_weights(single).items():
        assert torch.equal(weight, policy_weights(double)[name].float())
    other = policy_weights(load_policy(model_dir, "float32", 4))
    assert not torch.equal(other["model.embed_tokens.weight"], single.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seeded_policy_computes_what_its_saved_folder_does(model_dir, tmp_path, dtype):
    long = torch.arange(200)[None] % 16  # far positions show frequencies that differ
    model = load_policy(model_dir, dtype, 3)
    model.save_pretrained(tmp_path / "saved")
    saved = load_policy(tmp_path / "saved", dtype, None)
    assert torch.equal(model(long).logits, saved(long).logits)
    engines = empty_model(model_dir, dtype)
    assign_weights(engines, policy_weights(model))
    assert torch.equal(engines(long).logits, model(long).logits)


def test_weights_travel_by_name_with_tied_ones_once(model_dir, tmp_path):
    model = load_policy(model_dir, "float32", 0)
    weights = policy_weights(model)
    assert "lm_head.weight" not in weights
    assert list(weights) == sorted(weights)
    save_file(dict(weights), tmp_path / "w.safetensors")
    engine = empty_model(model_dir, "float32")
    assign_weights(engine, read_weights([tmp_path / "w.safetensors"]))
    assert torch.equal(engine(TOKENS).logits, model(TOKENS).logits)
    model.save_pretrained(str(model_dir))
    assert torch.equal(load_policy(model_dir, "float32", None)(TOKENS).logits, model(TOKENS).logits)


def test_weights_of_another_model_are_refused_and_change_nothing(model_dir):
    model = load_policy(model_dir, "float32", 0)
    before = {name: weight.clone() for name, weight in policy_weights(model).items()}
    wrong = {**before, "model.norm.weight": torch.ones(7)}
    with pytest.raises(ModelError, match=r"model.norm.weight has shape \(7,\)"):
        assign_weights(model, {n: w + 1 if w.shape != (7,) else w for n, w in wrong.items()})
    with pytest.raises(ModelError, match="one side only"):
        assign_weights(model, {"x": torch.ones(1)})
    assert all(torch.equal(w, before[n]) for n, w in policy_weights(model).items())


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "config.json does not exist"),
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b'{"model_type": "never_heard_of"}', "config.json cannot be read"),
        ("generation_config.json", b"{", "generation_config.json cannot be read"),
        ("tokenizer.json", b"{", "no readable tokenizer"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "cannot be read"),
    ],
)
def test_a_broken_folder_is_named_with_its_file(model_dir, file, content, words):
    (model_dir / file).unlink(missing_ok=True)
    if content is not None:
        (model_dir / file).write_bytes(content)
    loads = {
        "tokenizer.json": load_tokenizer,
        "generation_config.json": lambda folder: empty_model(folder, "float32"),
    }
    with pytest.raises(ModelError, match=words):
        loads.get(file, lambda folder: load_policy(folder, "float32", 0))(model_dir)


def test_missing_tensors_and_missing_weights_are_refused(model_dir):
    with pytest.raises(ModelError, match="give a seed"):
        load_policy(model_dir, "float32", None)
    weights = dict(policy_weights(load_policy(model_dir, "float32", 0)))
    weights.pop("model.norm.weight")
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing_keys model\.norm\.weight"):
        load_policy(model_dir, "float32", None)


def test_logits_that_are_not_hidden_times_head_are_refused(model_dir):
    config = LlamaConfig.from_pretrained(str(model_dir))
    config.final_logit_softcapping = 30.0
    config.save_pretrained(str(model_dir))
    with pytest.raises(ModelError, match="final_logit_softcapping = 30"):
        load_policy(model_dir, "float32", 0)


def test_prompts_render_as_the_chat_template_does_singly_or_together(model_dir):
    tokenizer = load_tokenizer(model_dir)
    chats = [[Message(role="user", content=text)] for text in ("abc", "a b")]
    want = []
    for chat in chats:
        plain = [{"role": "user", "content": chat[0].content}]
        rendered: Any = tokenizer.apply_chat_template(plain, add_generation_prompt=True)
        want.append(rendered["input_ids"])
    assert render_prompts(tokenizer, chats) == want
    assert [render_prompt(tokenizer, chat) for chat in chats] == want
    assert want[0] == [2, 4, 5, 6, 3]
    assert end_token_ids(load_policy(model_dir, "float32", 0), tokenizer) == (1,)


def test_without_a_chat_template_prompts_are_plain_text(model_dir):
    tokenizer = load_tokenizer(model_dir)
    tokenizer.chat_template = None
    assert render_prompt(tokenizer, [{"role": "user", "content": "abc"}]) == [4, 5, 6]


def test_a_head_that_is_not_one_linear_layer_is_refused(model_dir, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(ModelError, match="no plain linear LM head"):
        load_policy(model_dir, "float32", 0)

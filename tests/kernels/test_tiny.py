"""The built-in tokenizer is what its script makes, and reads any text."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

TINY = Path(__file__).parents[2] / "kernels" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_shipped_tokenizer_is_what_its_script_makes(tmp_path):
    path = Path(__file__).with_name("make_tiny_tokenizer.py")
    spec = importlib.util.spec_from_file_location("make_tiny_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (TINY / name).read_text()


def test_every_digit_is_a_token_of_its_own(tokenizer):
    ids = tokenizer("= 1234 - 56", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in ids]
    assert [piece for piece in pieces if piece.strip().isdigit()] == list("123456")


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_system_and_user_messages_are_rendered_in_order(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 ="}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>Be brief.<|user|>1 + 1 =<|assistant|>"

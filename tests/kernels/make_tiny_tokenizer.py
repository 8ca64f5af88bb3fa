"""Make the tokenizer of `builtin:tiny`: a small byte-level BPE in which every digit stands alone.

Run as `python tests/kernels/make_tiny_tokenizer.py kernels/tiny`; `test_tiny.py` holds the shipped
files against what this makes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 448
SPECIAL = ["<|pad|>", "<|bos|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
TASKS = ["chain_sum", "basic_arithmetic", "products", "gcd", "lcm", "leg_counting"]

# A word takes the space before it, an operator those on both sides, a digit none:
# "problem: 4 - 13 =" becomes " problem", ": ", "4", " - ", "1", "3", " =".
PIECES = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+ ?|\n|[^\S\n]+")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def worked(expression: str) -> str:
    """The running sums of a chain such as "7 - 9 + 4", a line each, then the answer."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{before} {sign} {term} = {total}")
    return "\n".join([*lines, f"Answer: {total}"])


def corpus() -> Iterator[str]:
    """Arithmetic questions of reasoning-gym, and worked solutions of those we demonstrate."""
    for task in TASKS:
        for entry in reasoning_gym.create_dataset(task, size=500, seed=0):
            yield entry["question"]
            if task == "chain_sum":
                yield worked(entry["metadata"]["expression"])


def train() -> PreTrainedTokenizerFast:
    """The tokenizer, its special tokens and its chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )


def write(folder: Path) -> None:
    """Save it as a Hugging Face tokenizer folder."""
    train().save_pretrained(folder)
    # Transformers 5 writes a class name that version 4, and servers built on it, do not know.
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

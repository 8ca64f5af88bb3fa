"""The policy under training: its model, its optimizer, and what both look like on disk.

Shape suffixes: B rows, L padded inputs of a row, D hidden size, V vocabulary, T trained tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from ..buffer.errors import ConfigError, CorruptData
from ..buffer.weight_files import Piece, tensors_digest
from ..kernels import attention, dispatch
from ..kernels.definition import FullLoss, Head, TokenLoss
from ..kernels.models import DTYPE_NAMES, assign_weights
from . import lora
from .batch import Rows
from .config import OptimizerConfig
from .critic import PREFIX, make_critic, values_of
from .noise import looked_back, scale
from .ranks import ALONE, Ranks
from .rows import Layout
from .shards import Stored, as_bytes, local, room_for

R = TypeVar("R")

RNG_NAME = "rng.torch"
AVERAGE_WEIGHT_NAME = "average.weight"
NOISE_NAME = "noise.sums"
PROBE_ROWS, PROBE_TOKENS = 1, 8
"""Few: training stands still meanwhile."""
BLOCK_8BIT = 256


class Policy:
    """A model, AdamW over it, and for bfloat16 the float32 masters that AdamW moves.

    Small updates vanish in bfloat16 (8 bits of mantissa), so the optimizer moves float32 copies and
    the model holds them rounded: exactly the weights that are published and sampled from. With
    several ranks all of it is about this rank's rows of each parameter (`ranks.shard`).
    """

    readers: Future[Any] | None = None
    """Who still reads the state, for a checkpoint: the next update waits for it."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: OptimizerConfig,
        average_decay: float | None = None,
        ranks: Ranks = ALONE,
        *,
        critic: bool = False,
    ) -> None:
        """Take over a model; nothing is copied unless it is bfloat16 or averaged. What needs no
        gradient (all but the adapters under LoRA) is not trained.

        Args:
            model: trained in place.
            config: of AdamW.
            average_decay: of the exponential average that `averaged` shows; None: there is none.
            ranks: among whom the model is sharded.
            critic: whether there is a value head, see `critic.py`.
        """
        self.model, self.config, self.ranks = model, config, ranks
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.rows = {name: local(parameter) for name, parameter in self.parameters.items()}
        """The parameters where they lie: themselves, or this rank's part of their memory."""
        self.rounded = model.dtype == torch.bfloat16
        self.masters: Mapping[str, Tensor] = self.parameters
        if self.rounded or ranks.size > 1:
            precise = {n: r.detach().float() if self.rounded else r.detach()
                       for n, r in self.rows.items()}  # fmt: skip
            self.masters = {name: master.requires_grad_() for name, master in precise.items()}
        self.optimizer = make_optimizer(list(self.masters.values()), config)
        self.critic = make_critic(model) if critic else None
        if self.critic is not None:
            self._add_critic(self.critic)
        self.average_decay = average_decay
        self.average = {} if average_decay is None else self._copy_of_masters()
        self.average_weight = torch.ones((), dtype=torch.float64)
        """Sum of decay^i over the updates so far: what the average divides by."""
        self.noise_sums = torch.zeros(2, dtype=torch.float64)

    def note_noise(self, noise: float, signal: float) -> dict[str, float | None]:
        """Metrics of the gradient's noise and signal, see `noise.py`, with what was before."""
        self.noise_sums = looked_back(self.noise_sums, noise, signal)
        return {
            "gradient_noise": noise,
            "gradient_signal": signal,
            "noise_scale": scale(self.noise_sums),
        }

    def _add_critic(self, critic: torch.nn.Linear) -> None:
        """Train it beside the model, at its own rate; it needs no master, it is not rounded."""
        own = {PREFIX + name: parameter for name, parameter in critic.named_parameters()}
        self.parameters |= own
        if self.masters is not self.parameters:
            self.masters = {**self.masters, **own}
        factor = self.config.critic_learning_rate / self.config.learning_rate
        self.optimizer.add_param_group({"params": list(own.values()), "factor": factor})

    def _copy_of_masters(self) -> dict[str, Tensor]:
        return {name: master.detach().clone() for name, master in self.masters.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights, inside a `with`.

        Source: PPO-EWMA (arXiv:2110.00641), bias-corrected: theta_0 counts like any other.
        """
        own = {name: rows.detach().clone() for name, rows in self.rows.items()}
        try:
            self._assign(self.average)
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, rows in self.rows.items():
            rows.copy_(values[name])

    @torch.no_grad()
    def _update_average(self) -> None:
        assert self.average_decay is not None
        self.average_weight = 1 + self.average_decay * self.average_weight
        for name, average in self.average.items():
            average.lerp_(self.masters[name], float(1 / self.average_weight))

    @property
    def loss_dtype(self) -> torch.dtype:
        """float64 for a float64 policy, else float32."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def update(self, learning_rate: float, grad_norm: Tensor) -> None:
        """Clip the accumulated gradients, whose total norm the caller has checked; apply AdamW."""
        if self.readers is not None:
            self.readers.result()
            self.readers = None
        clip_grads_with_norm_(self.masters.values(), self.config.max_grad_norm, grad_norm)
        for group in self.optimizer.param_groups:
            rate = learning_rate * group.get("factor", 1.0)
            if isinstance(group["lr"], Tensor):  # torchao's, which compiles the rate in otherwise
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        with self._stance():
            self.optimizer.step()
        self.clear_gradients()
        if self.rounded:
            self._assign(self.masters)
        if self.average:
            self._update_average()

    def _stance(self) -> AbstractContextManager[object]:
        """torchao compiles its update: worth it on a GPU, minutes for nothing on a CPU."""
        on_cpu = next(iter(self.masters.values())).device.type == "cpu"
        eager = self.config.name == "adamw_8bit" and on_cpu
        return torch.compiler.set_stance("force_eager") if eager else nullcontext()

    def grad_norm(self) -> Tensor:
        """The 2-norm of all accumulated gradients together, over all ranks."""
        if self.masters is not self.parameters:
            for name, parameter in self.parameters.items():
                grad = parameter.grad
                master = self.masters[name]
                master.grad = None if grad is None else local(grad).to(master.dtype)
        if self.ranks.size == 1:
            return get_total_norm([p.grad for p in self.masters.values() if p.grad is not None])
        own = [m.grad for n, m in self.masters.items() if not n.startswith(PREFIX)]
        norm = get_total_norm([grad for grad in own if grad is not None])
        square = self.ranks.total([float(norm) ** 2])[0] + self._sum_critic()
        return norm.new_tensor(square).sqrt()

    def _sum_critic(self) -> float:
        """Give every rank the sum of the critic's gradients; returns its squared norm. The critic
        is whole on each of them, so nobody else sums it."""
        square = 0.0
        for parameter in self.critic.parameters() if self.critic is not None else ():
            assert parameter.grad is not None
            summed = self.ranks.total(parameter.grad.flatten().tolist())
            parameter.grad.copy_(parameter.grad.new_tensor(summed).view_as(parameter.grad))
            square += sum(value**2 for value in summed)
        return square

    def clear_gradients(self) -> None:
        """Forget accumulated gradients."""
        for tensors in (self.parameters, self.masters):
            for tensor in tensors.values():
                tensor.grad = None

    def weights(self) -> dict[str, Tensor]:
        """What is published; no copies but of weights that adapters change."""
        return lora.merged_weights(self.model)

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments, float32 masters if there are any, and torch's random state, by name."""
        state = {RNG_NAME: torch.get_rng_state()}
        for name, master in self.masters.items():
            for field, value in self.optimizer.state.get(master, {}).items():
                if hasattr(value, "codes"):  # 8 bits
                    state[f"{name}:{field}.codes"] = value.codes
                    state[f"{name}:{field}.scale"] = value.scale
                else:
                    state[f"{name}:{field}"] = self._as_part(name, value)
            if self.rounded or name.startswith(PREFIX):
                state[f"{name}:master"] = self._as_part(name, master.detach())
            if self.average:
                state[f"{name}:average"] = self._as_part(name, self.average[name])
        if self.average:
            state[AVERAGE_WEIGHT_NAME] = self.average_weight
        if self.noise_sums.any():
            state[NOISE_NAME] = self.noise_sums
        return state

    def _as_part(self, name: str, rows: Tensor) -> Tensor:
        """Rows of something that is sharded as a parameter is, as the part that they are."""
        whole = self.parameters[name]
        if not isinstance(whole, DTensor) or not rows.ndim:
            return rows
        return DTensor.from_local(
            rows, whole.device_mesh, whole.placements,
            run_check=False, shape=whole.shape, stride=whole.stride(),
        )  # fmt: skip

    def room_for_state(self, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
        """Empty tensors for the optimizer state of a checkpoint, sharded as it is held here.

        Raises:
            CorruptData: the state is another model's.
        """
        room = {}
        for key, what in stored.items():
            name, of_parameter, _ = key.rpartition(":")
            if of_parameter and name not in self.parameters:
                raise CorruptData(f"the optimizer state names {name}, which the model has not")
            if of_parameter or key in (RNG_NAME, AVERAGE_WEIGHT_NAME, NOISE_NAME):
                room[key] = room_for(what, self.parameters.get(name))
        return room

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `weights()` and `optimizer_state()` were taken. Adapters are the
        caller's: weights have them merged in.

        Raises:
            ModelError: the weights are another model's.
            CorruptData: the state is another model's.
        """
        if not lora.adapters(self.model):
            assign_weights(self.model, weights)
        torch.set_rng_state(state[RNG_NAME])
        for key, value in state.items():
            name, _, field = key.rpartition(":")
            value = local(value)
            if key == AVERAGE_WEIGHT_NAME:
                self.average_weight = value.clone()
            if key == NOISE_NAME:
                self.noise_sums = value.clone()
            if key in (RNG_NAME, AVERAGE_WEIGHT_NAME, NOISE_NAME):
                continue
            if name not in self.masters:
                raise CorruptData(f"the optimizer state names {name}, which the model has not")
            if field == "average":
                self.average[name] = value.clone()
            elif field == "master":
                with torch.no_grad():
                    self.masters[name].copy_(value)
            else:
                self._restore_moment(self.masters[name], field, value)

    def _restore_moment(self, master: Tensor, field: str, value: Tensor) -> None:
        moments = self.optimizer.state[master]
        moment, _, part = field.partition(".")
        if not part:
            moments[field] = value.to(master.device, copy=True)
            return
        from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore

        if moment not in moments:
            moments[moment] = OptimState8bit.zeros(
                master.shape, signed=moment == "exp_avg", block_size=BLOCK_8BIT, dtype=master.dtype
            )
        getattr(moments[moment], part).copy_(value)


def make_optimizer(masters: list[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the config names.

    Raises:
        ConfigError: torchao is not installed, or the weights are float64, which it would round.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate, "betas": config.betas, "eps": config.eps,
        "weight_decay": config.weight_decay,
    }  # fmt: skip
    if config.name == "adamw":
        return torch.optim.AdamW(masters, **settings, fused=True)
    if any(master.dtype == torch.float64 for master in masters):
        raise ConfigError(
            'learner.optimizer.name = "adamw_8bit" computes in float32, which dtype = "float64" '
            'asks not to; use "adamw"'
        )
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore
    except ImportError as error:
        raise ConfigError(
            f'learner.optimizer.name = "adamw_8bit" needs the package torchao ({error}): '
            "pip install 'slipstream[adam8bit]'"
        ) from error
    return AdamW8bit(masters, **settings, block_size=BLOCK_8BIT)


def score(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every scored token under a model; [T] each, with gradient."""
    return gathered(model, lambda: dispatch.scores(*_scored(model, rows)))


def gathered(model: PreTrainedModel, work: Callable[[], R]) -> R:
    """Do what reads the parameters themselves, embedding and head, while they are whole here."""
    run = getattr(model, "gathered", None)  # see `ranks.shard`
    if run is None:
        return work()
    done = run(work)
    if not torch.is_grad_enabled():  # no backward will let go of them
        model.reshard()  # pyright: ignore
    return done


def whole_loss(
    model: PreTrainedModel,
    rows: Rows,
    token_loss: TokenLoss,
    beside: Callable[[Tensor], Tensor] | None = None,
) -> FullLoss:
    """As `fused_loss`, for an objective that has to see all tokens of a sample at once."""

    def work() -> FullLoss:
        hidden_TD, targets_T, head = _scored(model, rows)
        logprobs_T, entropy_T = dispatch.scores(hidden_TD, targets_T, head)
        loss_T, seen_T = token_loss(logprobs_T, entropy_T, slice(0, len(logprobs_T)))
        loss = loss_T.sum() if beside is None else loss_T.sum() + beside(hidden_TD)
        return FullLoss(loss, logprobs_T.detach(), entropy_T.detach(), dict(seen_T))

    return gathered(model, work)


@torch.no_grad()
def score_frozen(model: PreTrainedModel, rows: Rows) -> Tensor:
    """[T] log-probabilities without gradient; equal to the bit to those of the other two."""
    return gathered(model, lambda: dispatch.frozen_scores(*_scored(model, rows)))[0]


def fused_loss(
    model: PreTrainedModel,
    rows: Rows,
    token_loss: TokenLoss,
    beside: Callable[[Tensor], Tensor] | None = None,
) -> FullLoss:
    """A token-separable objective over the scored tokens, fused with the LM head.

    Args:
        model: the policy.
        rows: what it is run over.
        token_loss: of each scored token.
        beside: a term that is a function of the scored tokens' hidden states, [T, D] -> scalar.
    """

    def work() -> FullLoss:
        hidden_TD, targets_T, head = _scored(model, rows)
        result = dispatch.full(hidden_TD, targets_T, head, token_loss)
        return result if beside is None else result._replace(loss=result.loss + beside(hidden_TD))

    return gathered(model, work)


@torch.no_grad()
def expected_returns(critic: torch.nn.Linear, model: PreTrainedModel, rows: Rows) -> Tensor:
    """[T] the critic's value of each scored token, before it is written."""
    return gathered(model, lambda: values_of(critic, scored_hidden(model, rows)))


def _scored(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor, Head]:
    """What the loss is computed from."""
    return scored_hidden(model, rows), rows.layout.targets_T, _head(model, rows)


def scored_hidden(model: PreTrainedModel, rows: Rows) -> Tensor:
    """[T, D] hidden states that predict the scored tokens: the LM head is applied only there."""
    return hidden_states(model, rows.layout).flatten(0, 1)[rows.layout.positions_T]


def _head(model: PreTrainedModel, rows: Rows) -> Head:
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)  # kernels/models.py refuses other heads
    return Head(head.weight, rows.temperature_T, head.bias, rows.kept)


def hidden_states(model: PreTrainedModel, layout: Layout) -> Tensor:
    """[B, L, D] last hidden states of a layout's rows.

    Rows without a shared prefix get no mask: transformers then uses torch's causal kernel.
    """
    mask, more = layout.mask_BLL, {}
    if layout.segments is not None:
        attention.enable(model)  # one that was not would see through the walls between samples
        more = {"segments": layout.segments}
    output = model.get_decoder()(
        input_ids=layout.input_ids_BL,
        position_ids=layout.position_ids_BL,
        attention_mask=None if mask is None else mask[:, None],
        use_cache=False,
        **more,
    )
    return output.last_hidden_state


def pieces(weights: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Weights as `Outbox.publish` takes them; no copies of what is contiguous."""
    return {
        name: Piece(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), np.asarray(as_bytes(tensor)))
        for name, tensor in weights.items()
    }


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The digest of a version, as `Outbox.write` takes it while it copies."""
    return tensors_digest(pieces(weights))


@torch.no_grad()
def probe(model: PreTrainedModel) -> dict[str, Tensor]:
    """Fixed token ids and the live policy's float32 logits on them, to compare an export with."""
    vocabulary = model.get_output_embeddings().weight.shape[0]  # pyright: ignore
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(vocabulary, (PROBE_ROWS, PROBE_TOKENS), generator=generator)
    with lora.merged(model):
        inputs_BL = tokens_BL.to(model.device)
        output = gathered(model, lambda: model.forward(input_ids=inputs_BL, use_cache=False))
    return {"token_ids": tokens_BL, "logits": output.logits.float().contiguous()}

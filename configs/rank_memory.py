"""What a learner rank holds on its device at the peak of a step, in closed form.

The terms are those that a dry run of the step finds (`slipstream plan --deep`, learner/dry.py), of
Llama-like layers; tests hold the two within 10% of each other.

Per rank of W, with N parameters of e bytes: everything is kept by parts of 1/W; the layer being
computed and its gradient are whole, as are embedding, norm and head. T tokens, D hidden size,
F intermediate size.
"""

from .schema import Experiment
from .sizes import DTYPE_BYTES, ModelSize, moment_bytes, trained_parameters


def rank_tokens(experiment: Experiment) -> int:
    """T, inputs of the largest micro-batch."""
    longest = experiment.rollout.sampling.max_new_tokens
    return max(experiment.learner.micro_batch_tokens, longest)


def rank_peak(experiment: Experiment, size: ModelSize) -> int:
    """Bytes at the highest of three moments: the first layer's backward over gradients that are
    there already, the norm of the gradients in float32, and the weights for engines being made.
    """
    learner, ranks = experiment.learner, experiment.cluster.learner_ranks
    element, trained = DTYPE_BYTES[experiment.dtype], trained_parameters(experiment, size)
    precise, adapters = max(4, element), bool(learner.lora.rank)
    own = element if not adapters else precise  # adapters are never rounded
    copied = own != precise
    references = 1 + (learner.objective.kl_coefficient > 0)
    weights = references * size.num_parameters * element + adapters * trained * own
    average = precise if learner.objective.proximal == "ewma" else 0
    state = trained * (2 * moment_bytes(experiment) + precise * copied + average)
    gradients = trained * own
    held = (weights + state) / ranks
    if ranks > 1:  # the reference has no backward pass, after which its outer weights would go
        held += (references - 1) * size.outer_parameters * element
    norm = held + (gradients + trained * precise * copied) / ranks
    publishing = held
    if adapters:  # every adapted weight once more, and the sum of one in float32
        changed = size.layers * size.layer_parameters * element / ranks
        publishing += changed + 2 * size.hidden * size.intermediate * precise
    backward = held + gradients / ranks + _whole(size, element, ranks, adapters)
    return int(max(norm, publishing, backward + _activations(experiment, size)))


def _whole(size: ModelSize, element: int, ranks: int, adapters: bool) -> float:
    """What is not in parts during backward: outer weights and two layers, and the gradients of the
    head and of a layer, which is summed over the ranks in float32 at least."""
    if ranks == 1:
        return 0
    weights = (size.outer_parameters + 2 * size.layer_parameters) * element
    if adapters:
        return weights
    head = size.vocabulary * size.hidden * element
    return weights + head + size.layer_parameters * max(4, element)


def _activations(experiment: Experiment, size: ModelSize) -> float:
    """Of the forward pass, with one layer's computed again where layers are."""
    learner, element = experiment.learner, DTYPE_BYTES[experiment.dtype]
    tokens = rank_tokens(experiment)
    row, wide = tokens * size.hidden, tokens * size.intermediate
    if learner.activations == "keep":
        return size.layers * (4 * wide * element + 7 * row * element + 2 * row * 4)
    share = 1.0
    if learner.activations == "stream":
        share = min(1.0, learner.stream_tokens / tokens)
    layer = share * (6 * wide * element + 2 * row * 4)
    if learner.lora.rank:  # peft computes in the adapters' float32
        layer += share * (4 * row + wide) * 4
    return (size.layers + 6) * row * element + layer

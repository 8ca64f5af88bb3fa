"""How long training stands still for a checkpoint: copied and written beside it, or written first.

One process trains a model of some 60M parameters (float32, AdamW: 0.7 GB of state) on random
tokens. Three arms in turn: no checkpoint, a synchronous save, the learner's own snapshot with the
writing in a thread. The stall is how long the training thread itself stands still: in the call, and
before the first update if the copy is not made by then. What the writing takes from the updates
beside it shows in the times of whole rounds, printed with it.
"""

import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import emit
from slipstream.learner.checkpoint import find_checkpoint
from slipstream.learner.config import LearnerConfig, LearnerSpec
from slipstream.learner.policy import Policy
from slipstream.learner.ranks import Ranks
from slipstream.learner.trainer import Trainer
from transformers import LlamaConfig, LlamaForCausalLM

ROUNDS = 3
UPDATES = 6


def make_trainer(folder: Path) -> Trainer:
    """A trainer at step 1 with moments, around a random model."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=640, num_hidden_layers=10, num_attention_heads=10,
        intermediate_size=1792, tie_word_embeddings=True,
    )  # fmt: skip
    spec = LearnerSpec(
        run_id="bench", run_dir=folder, endpoint="", weights_dir=folder, seed=0, model_dir=folder,
        dtype="float32", engine_dtype="float32", config=LearnerConfig(), samples_per_prompt=2,
        max_staleness_steps=0, ratio_law="temperature", take_deadline_s=1, branch=0,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(spec)
    trainer.ranks = Ranks()
    trainer._hold(Policy(LlamaForCausalLM(config), spec.config.optimizer), step=1)
    update(trainer)
    return trainer


def update(trainer: Trainer) -> float:
    """One forward, backward and AdamW step; the seconds it waited for a copy to be made."""
    tokens = torch.randint(8192, (1, 64))
    trainer.policy.model(input_ids=tokens, labels=tokens).loss.backward()
    norm, began = trainer.policy.grad_norm(), time.perf_counter()
    if trainer.policy.readers is not None:
        trainer.policy.readers.result()
    waited = time.perf_counter() - began
    trainer.policy.update(1e-5, norm)
    return waited


def round_of(trainer: Trainer, arm: str) -> tuple[float, float]:
    """Seconds of a round of updates, and of them how long the saving held training up."""
    began, thread, blocked = time.perf_counter(), None, 0.0
    if arm == "sync":
        trainer.save()
    elif arm == "async":
        thread = threading.Thread(target=trainer.snapshot())
        thread.start()
    blocked = time.perf_counter() - began
    for _ in range(UPDATES):
        blocked += update(trainer)
    seconds = time.perf_counter() - began
    if thread is not None:
        if thread.is_alive():
            print("note: the write outlasted the round; raise UPDATES", flush=True)
        thread.join()
    return seconds, blocked


def main() -> None:
    """Print one line: the stall of both, and their ratio."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        trainer = make_trainer(Path(name))
        for arm in ("none", "sync", "async"):  # warm-up: page cache, copies, moments
            round_of(trainer, arm)
        times: dict[str, list[tuple[float, float]]] = {"none": [], "sync": [], "async": []}
        for _ in range(ROUNDS):
            for arm, found in times.items():
                found.append(round_of(trainer, arm))
        find_checkpoint(trainer.root)
    blocked = {arm: [b for _, b in times[arm]] for arm in ("sync", "async")}
    ours, peer = statistics.median(blocked["async"]), statistics.median(blocked["sync"])
    rounds = {arm: statistics.median(seconds for seconds, _ in times[arm]) for arm in times}
    emit(
        {
            "bench": "checkpoint",
            "case": "stall",
            "ours": ours,
            "peer": peer,
            "peer_name": "synchronous save of the same state",
            "ratio": peer / ours,
            "unit": "s",
            "runs": ROUNDS,
            "spread": [min(blocked["async"]), max(blocked["async"])],
            "notes": f"target: ours <= 10% of peer, found {ours / peer:.1%}; a round of {UPDATES} "
            f"updates took {rounds['none']:.2f} s without a checkpoint, {rounds['sync']:.2f} s "
            f"with a synchronous and {rounds['async']:.2f} s with an asynchronous one",
        }
    )


if __name__ == "__main__":
    main()

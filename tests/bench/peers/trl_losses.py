"""TRL's own loss code on log-probabilities given as JSON on stdin; losses and gradients on stdout.

Runs in TRL's environment. Only the forward pass is replaced: everything after it is TRL's.
"""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import GRPOTrainer


class OneProcess:
    """What the loss asks of accelerate, with one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, value):
        """Nothing to gather."""
        return value

    gather_for_metrics = gather

    def reduce(self, value, reduction):
        """Nothing to reduce."""
        return value


def run(case: dict) -> dict:
    """One loss: `options` become attributes of the trainer."""
    logps = torch.tensor(case["current"], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(case["mask"])
    trainer = SimpleNamespace(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, model=SimpleNamespace(training=True),
        _entropy_bonus_enabled=False, vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1, accelerator=OneProcess(),
        _metrics=defaultdict(lambda: defaultdict(list)), max_completion_length=case["budget"],
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        **case["options"],
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(case["advantages"], dtype=torch.float64),
        "old_per_token_logps": torch.tensor(case["proximal"], dtype=torch.float64),
        "ref_per_token_logps": torch.tensor(case["reference"], dtype=torch.float64),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": logps.grad.tolist()}


print(json.dumps([run(case) for case in json.load(sys.stdin)]))

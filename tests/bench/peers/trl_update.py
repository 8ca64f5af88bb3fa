"""TRL's update on a given batch, in an environment of its own: everything of GRPOTrainer but
generation and scoring.

    python trl_update.py MODEL BATCH.json OUT.json RATE MICRO_BATCH UPDATES THREADS

BATCH.json: prompts [N][P], completions [N][C], advantages [N]. OUT.json: seconds per update and
gradient norms. The batch is padded to its longest completion and cut into micro-batches, as the
trainer does.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

SAMPLES_PER_PROMPT = 8


def padded(rows, left):
    """[N, longest] ids and mask."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        place = slice(width - len(values), width) if left else slice(0, len(values))
        ids[row, place] = torch.tensor(values)
        mask[row, place] = 1
    return ids, mask


class Given(GRPOTrainer):
    """Trains on a batch that is there already."""

    given = None

    def _generate_and_score_completions(self, inputs):
        return dict(self.given)


class Clock(TrainerCallback):
    """When each update ended."""

    def __init__(self):
        self.ends, self.norms = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.ends:
            self.ends.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in (logs or {}):
            self.norms.append(float(logs["grad_norm"]))


def main() -> None:
    model_dir, batch, out, rate, micro, updates, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    given = json.loads(Path(batch).read_text())
    prompt_ids, prompt_mask = padded(given["prompts"], left=True)
    completion_ids, completion_mask = padded(given["completions"], left=False)
    count = len(given["prompts"])
    clock = Clock()
    trainer = Given(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=Dataset.from_list([{"prompt": "?"}] * count),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(Path(out).with_suffix("")),
            per_device_train_batch_size=int(micro),
            gradient_accumulation_steps=count // int(micro),
            num_generations=SAMPLES_PER_PROMPT,
            learning_rate=float(rate),
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=0.0,
            temperature=1.0,
            loss_type="dapo",
            max_steps=int(updates),
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        ),
    )
    trainer.given = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(given["advantages"]),
        "num_items_in_batch": completion_mask.sum(),
    }
    trainer.train()
    seconds = [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
    Path(out).write_text(json.dumps({"seconds": seconds, "grad_norms": clock.norms}))


if __name__ == "__main__":
    main()

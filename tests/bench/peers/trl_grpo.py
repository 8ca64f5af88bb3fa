"""Train with TRL's GRPOTrainer and print held-out reward against training seconds, as JSON lines.

Runs in TRL's own environment (`make bench-e2e` builds it) and imports nothing of slipstream.
Evaluation time is not counted: the clock stops while held-out prompts are scored. It starts when
training begins, with model and data loaded.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]


class Done(Exception):
    """The target was reached, or the time is over."""


def extract(text: str, pattern: str) -> str:
    """The answer in a completion, empty when there is none."""
    found = re.findall(pattern, text)
    return " ".join(found[-1].split()) if found else ""


@torch.no_grad()
def held_out_reward(model, tokenizer, rows, args) -> float:
    """Share of held-out prompts answered right, sampled as in training."""
    model.eval()
    with torch.random.fork_rng():  # training's own random numbers go on where they were
        torch.manual_seed(args.seed)
        texts = sample(model, tokenizer, rows, args)
    model.train()
    right = [
        extract(text, args.pattern) == row["answer"] for text, row in zip(texts, rows, strict=True)
    ]
    return sum(right) / len(right)


def sample(model, tokenizer, rows, args) -> list[str]:
    """One completion per prompt, at temperature 1."""
    texts = []
    for start in range(0, len(rows), 256):
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            for row in rows[start : start + 256]
        ]
        batch = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        batch.pop("token_type_ids", None)
        out = model.generate(
            **batch,
            max_new_tokens=args.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
        ids = out[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


class Clock(TrainerCallback):
    """Counts training seconds, evaluates every so many steps, ends at the target."""

    def __init__(self, args, tokenizer, rows):
        self.args, self.tokenizer, self.rows = args, tokenizer, rows
        self.seconds, self.resumed = 0.0, time.perf_counter()

    def evaluate(self, model, step: int) -> None:
        self.seconds += time.perf_counter() - self.resumed
        reward = held_out_reward(model, self.tokenizer, self.rows, self.args)
        print(json.dumps({"step": step, "seconds": self.seconds, "reward": reward}), flush=True)
        if reward >= self.args.target or self.seconds > self.args.max_seconds:
            raise Done
        self.resumed = time.perf_counter()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seconds, self.resumed = 0.0, time.perf_counter()
        self.evaluate(model, 0)
        self.seconds, self.resumed = 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.args.eval_every == 0:
            self.evaluate(model, state.global_step)


class Trainer(GRPOTrainer):
    """Warms up as slipstream does: step s at s / warmup_steps, so that the first one counts.

    The schedules of transformers begin at (s - 1) / warmup_steps, which wastes a step.
    """

    def create_scheduler(self, num_training_steps, optimizer=None):
        warmup = max(1, self.args.warmup_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda done: min(1.0, (done + 1) / warmup)
        )
        return self.lr_scheduler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="JSONL: prompt (chat), answer")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--pattern", required=True)
    parser.add_argument("--target", type=float, required=True)
    parser.add_argument("--max-seconds", type=float, required=True)
    parser.add_argument("--eval-every", type=int, default=5)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--prompts-per-step", type=int, required=True)
    parser.add_argument("--samples-per-prompt", type=int, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--scale-rewards", choices=["group", "none"], required=True)
    parser.add_argument("--loss-type", choices=["dapo", "grpo"], required=True)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--beta1", type=float, default=0.9)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = [json.loads(line) for line in args.train.read_text().splitlines()]
    held_out = [json.loads(line) for line in args.held_out.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    def reward(completions, answer, **kwargs):
        return [
            float(extract(completion[0]["content"], args.pattern) == gold)
            for completion, gold in zip(completions, answer, strict=True)
        ]

    clock = Clock(args, tokenizer, held_out)
    trainer = Trainer(
        model=model,
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(args.work),
            per_device_train_batch_size=args.prompts_per_step * args.samples_per_prompt,
            num_generations=args.samples_per_prompt,
            max_completion_length=args.max_new_tokens,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            adam_beta1=args.beta1,
            adam_beta2=args.beta2,
            beta=0.0,
            temperature=1.0,
            loss_type=args.loss_type,
            scale_rewards=args.scale_rewards,
            shuffle_dataset=False,  # the prompts come in slipstream's order
            max_steps=10_000,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            seed=args.seed,
        ),
    )
    try:
        trainer.train()
    except Done:
        return
    raise SystemExit("TRL ended before the target or the time limit")


if __name__ == "__main__":
    main()

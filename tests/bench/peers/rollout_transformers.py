"""transformers' generation of given workloads, and the model's matrix products alone.

    python rollout_transformers.py MODEL_DIR THREADS ENDS [ASSISTANT_DIR]

ENDS is 1 where end tokens end a sample. Protocol: see `rollout_vllm.py`; beside `work` a line holds

    how        batch      one static batch, padded on the left, until its longest row has ended
               lookup     each sample by itself, drafted by prompt lookup
               assisted   each sample by itself, drafted by the assistant
               products   nothing but the products of a workload of equal lengths, each prompt
                          computed once, by the fastest of three layouts for each number of rows
               step       nothing but the products of one step of `rows` rows

In a process of its own: two threads that both compute on all cores keep a team of threads each, and
teams of more threads than there are cores put theirs to sleep after every product.
"""

import json
import sys
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from slipstream.kernels.models import load_policy
from torch.nn import functional

LOOKUP_TOKENS = 10
"""What transformers' documentation tells prompt lookup to draft."""

Workload = Sequence[tuple[Sequence[int], int]]


class Side:
    """One model."""

    def __init__(self, model_dir: str, ends: bool, assistant_dir: str | None) -> None:
        self._model: Any = load_policy(model_dir, "float32", seed=None)
        self._drafts: dict[str, dict[str, Any]] = {
            "lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        }
        if not ends:
            self._model.generation_config.eos_token_id = None
        if assistant_dir:
            assistant = load_policy(assistant_dir, "float32", seed=None)
            self._drafts["assisted"] = {"assistant_model": assistant}

    def run(self, how: str, work: Workload, rows: int = 0) -> dict[str, float]:
        """Seconds, and useful tokens."""
        started_s = perf_counter()
        if how == "batch":
            self._batch(work)
            tokens = sum(count for _, count in work)
        elif how == "products":
            return self._products(work)
        elif how == "step":
            return {"seconds": fastest(self._weights(), rows), "tokens": rows}
        else:
            tokens = self._one_by_one(work, **self._drafts[how])
        return {"seconds": perf_counter() - started_s, "tokens": tokens}

    def _batch(self, work: Workload) -> None:
        longest = max(len(prompt) for prompt, _ in work)
        ids_BL = torch.zeros(len(work), longest, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for row, (prompt, _) in enumerate(work):
            ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BL[row, longest - len(prompt) :] = 1
        self._generate(ids_BL, mask_BL, max(count for _, count in work))

    def _one_by_one(self, work: Workload, **options: Any) -> int:
        tokens = 0
        for prompt, count in work:
            ids_1L = torch.tensor([prompt])
            out_1L = self._generate(ids_1L, torch.ones_like(ids_1L), count, **options)
            tokens += out_1L.shape[1] - len(prompt)
        return tokens

    def _generate(
        self, ids_BL: torch.Tensor, mask_BL: torch.Tensor, count: int, **options: Any
    ) -> torch.Tensor:
        with torch.inference_mode():
            return self._model.generate(
                ids_BL, attention_mask=mask_BL, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=count, pad_token_id=0, **options,
            )  # fmt: skip

    def _weights(self) -> list[torch.Tensor]:
        return [m.weight for m in self._model.modules() if isinstance(m, torch.nn.Linear)]

    def _products(self, work: Workload) -> dict[str, float]:
        body = [
            m.weight for m in self._model.base_model.modules() if isinstance(m, torch.nn.Linear)
        ]
        rows, steps = len(work), work[0][1]
        prompts = {tuple(prompt) for prompt, _ in work}
        step, first = fastest(self._weights(), rows), fastest(body, sum(map(len, prompts)))
        return {"seconds": first + (steps - 1) * step, "tokens": rows * steps}


def fastest(weights: Sequence[torch.Tensor], rows: int) -> float:
    """Seconds of x @ W.T for all of some weights."""
    pack = torch.ops.mkldnn._reorder_linear_weight
    product = torch.ops.mkldnn._linear_pointwise
    layouts = (
        (lambda w: w, functional.linear),
        (lambda w: w.T.contiguous(), torch.matmul),
        (lambda w: pack(w, rows), lambda x, w: product(x, w, None, "none", [], "")),
    )
    inputs = {n: torch.randn(rows, n) for n in {w.shape[1] for w in weights}}
    found = []
    with torch.inference_mode():
        for lay, multiply in layouts:
            laid = [(inputs[w.shape[1]], lay(w)) for w in weights]
            times = []
            for _ in range(5):
                started_s = perf_counter()
                for x, w in laid:
                    multiply(x, w)
                times.append(perf_counter() - started_s)
            found.append(median(times[1:]))
    return min(found)


def main() -> None:
    """Answer until there is no more to answer."""
    model_dir, threads, ends, *assistant = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(model_dir, ends == "1", assistant[0] if assistant else None)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(side.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

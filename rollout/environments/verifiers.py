"""Environments of the package `verifiers`, run as they are against the episode's endpoint.

    [environment]
    name = "verifiers"
    arguments = { env = "my-env", args = { difficulty = "easy" } }

    [prompts]
    source = "function"
    task = "slipstream.rollout.environments.verifiers:row"
    task_config = { env = "my-env", args = { difficulty = "easy" } }

The environment's own data set gives the prompts and its rubric the score, with every metric as a
component; tools reach the policy through its chat template. Turns and tokens are bounded by
`[environment]` and `[rollout.sampling]`, whatever the environment asks for besides.
"""

import functools
import json
import signal
from typing import Any

from ...buffer.errors import ConfigError
from ...buffer.records import Prompt, Score
from ..imports import where_raised
from ..plain import plain
from .base import Endpoint

EXAMPLE = "verifiers"
"""Payload key: the row of the environment's data set."""


class Verifiers:
    """One environment of the package, for every episode of a worker."""

    def __init__(self, *, env: str, args: dict[str, Any] | None = None) -> None:
        """Load it.

        Args:
            env: its id, the name of an installed module with `load_environment`.
            args: arguments of that function.
        Raises:
            ConfigError: it, or the package, cannot be loaded, or it scores whole groups.
        """
        self._env = _load(env, json.dumps(args or {}, sort_keys=True))
        if self._env.requires_group_rollouts:
            raise ConfigError(
                f"environment.arguments.env = {env!r} has rewards of whole groups, which are not "
                "supported: episodes are scored one by one, the learner compares them"
            )

    async def run(self, prompt: Prompt, endpoint: Endpoint) -> Score:
        """One rollout of the package's own, and its rubric's score.

        Raises:
            ValueError: a prompt that does not come from the environment's data set.
            Exception: what went wrong outside the policy (a tool, a sandbox, the network).
        """
        import openai  # pyright: ignore
        from verifiers.clients import OpenAIChatCompletionsClient  # pyright: ignore
        from verifiers.errors import ModelError  # pyright: ignore

        if EXAMPLE not in prompt.payload:
            raise ValueError(
                'its prompts must come from prompts.source = "function" with prompts.task = '
                f'"{__name__}:row"'
            )
        # No retries: the endpoint refuses what is over the budgets, and will do so again.
        async with openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0
        ) as client:
            state = await self._env.rollout(
                input=dict(prompt.payload[EXAMPLE]),
                client=OpenAIChatCompletionsClient(client),
                model=endpoint.model,
                sampling_args={},
            )
        error = state.get("error")
        try:
            # An empty answer and a used-up budget are the policy's doing: the rubric judges them.
            if error is not None and not isinstance(error, ModelError):
                raise error
            await self._env.rubric.score_rollout(state)
        finally:
            await self._env.rubric.cleanup(state)
        metrics = state.get("metrics") or {}
        components = {name: float(value) for name, value in metrics.items() if value is not None}
        return Score(value=float(state["reward"]), components=components)


def row(seed: int, *, env: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """A prompt of an environment's training data, for `prompts.source = "function"`.

    Args:
        seed: which one.
        env: see `Verifiers`.
        args: see `Verifiers`.
    Returns:
        The row's chat as `prompt`, its `answer`, and all of it for the environment.
    Raises:
        ConfigError: see `Verifiers`.
    """
    dataset = _load(env, json.dumps(args or {}, sort_keys=True)).get_dataset()
    example = plain(dict(dataset[seed % len(dataset)]))
    chat = [{"role": each["role"], "content": each["content"]} for each in example["prompt"]]
    return {"prompt": chat, "answer": example.get("answer", ""), EXAMPLE: example}


@functools.cache
def _load(env: str, args: str) -> Any:
    try:
        import verifiers  # pyright: ignore
    except ImportError as error:
        raise ConfigError(
            f"environment {env!r} needs the package verifiers ({error}): "
            "pip install 'slipstream[verifiers]'"
        ) from error
    # It would take over SIGINT and SIGTERM, which are the process's, and only its main thread may.
    install, signal.signal = signal.signal, lambda *_: None  # type: ignore[assignment]
    try:
        return verifiers.load_environment(env, **json.loads(args))  # pyright: ignore
    except Exception as error:  # the environment's own code
        raise ConfigError(
            f"environment.arguments.env = {env!r} with args = {args} cannot be loaded: "
            f"{where_raised(error)}"
        ) from error
    finally:
        signal.signal = install

"""Plays episodes: an environment and the policy in turns, each within its time and budgets."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...buffer.records import Completion, Message, Prompt, Score
from ..config import EnvironmentConfig
from ..engine import Engine, GenerationOutput, GenerationRequest
from ..imports import where_raised
from ..rewards.base import failed, normalised
from .base import Agent, Environment, Step, is_agent, load_environment, state_hash
from .chat import ChatFormat
from .conversation import Conversation, Episode, EpisodeFull
from .endpoint import EndpointServer

MAX_FORMATS = 64
"""Conversation formats kept: an agent may offer other tools in every episode."""


class Player:
    """Plays the configured environment on an engine; episodes run side by side."""

    def __init__(self, config: EnvironmentConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load it.

        Raises:
            ConfigError: see `load_environment`, and a chat template that cannot show its tools.
        """
        self._config, self._tokenizer = config, tokenizer
        self._make = load_environment(config)
        self._chats: dict[str, ChatFormat] = {}
        self._server = EndpointServer() if is_agent(self._make) else None

    async def close(self) -> None:
        """Close the endpoint, when there is one."""
        if self._server is not None:
            await self._server.close()

    async def play(self, engine: Engine, request: GenerationRequest, prompt: Prompt) -> Episode:
        """One episode; whatever the environment does, there is an answer in bounded time.

        Args:
            engine: of the policy.
            request: law, key and budget of the sample; its prompt tokens are not used.
            prompt: what the environment starts from.
        """
        environment: Any = None if self._server else self._make()  # pyright: ignore
        chat = self._chat(getattr(environment, "tools", ()))
        broken: list[Exception] = []

        async def generate(turn: GenerationRequest) -> GenerationOutput:
            try:
                return await anext(aiter(engine.generate([turn])))
            except Exception as error:
                broken.append(error)
                raise

        talk = Conversation(generate, chat, request, self._config.max_turn_tokens)
        try:
            if self._server is None:
                score = await self._alternate(environment, talk, prompt)
            else:
                score = await self._run_agent(self._make, talk, prompt)  # pyright: ignore
        except TimeoutError:
            limit = f"environment.timeout_s = {self._config.timeout_s:g} s"
            score = failed(f"the environment took longer than {limit}")
        except (Exception, SystemExit) as error:  # the user's code: its failure is the sample's
            score = failed(f"the environment raised {where_raised(error)}")
        if broken:  # an agent may have made an error of the endpoint its own
            raise broken[0]
        return _finished(talk, score)

    async def _alternate(
        self, environment: Environment, talk: Conversation, prompt: Prompt
    ) -> Score | None:
        """Reset, then answer and step until the environment or a budget ends it."""
        step = await self._timed(environment.reset, prompt)
        messages = [*prompt.messages, *self._observed(step, self._config.max_turns)]
        total, components = None, dict(step.components)
        for left in reversed(range(self._config.max_turns)):
            try:
                output = await talk.reply(messages, state_hash(step.state))
            except EpisodeFull:
                break
            if output.error or output.finish_reason == "abort":
                return None
            step = await self._timed(environment.step, output.text)
            components |= step.components
            if step.reward is not None:
                total = (total or 0.0) + step.reward
                talk.reward_last(step.reward)
            if step.done:
                break
            messages = self._observed(step, left)
        if total is None:
            return None
        checked = normalised(total)
        components["turns"] = float(len(talk.outputs))
        return checked if checked.value is None else Score(value=total, components=components)

    def _observed(self, step: Step, turns_left: int) -> list[Message]:
        """The observation as a message, with the turns that are left."""
        text = step.observation
        if self._config.show_budget:
            text = f"{text}\n(turns left: {turns_left})".strip()
        return [Message(role=step.role, content=text)] if text else []  # pyright: ignore

    async def _timed(self, function: Callable[..., Any], argument: Any) -> Step:
        """Call a method of the environment; a plain function in a thread, so that it cannot stop
        the worker (a thread that never ends is left behind: such code belongs in a process)."""
        async with asyncio.timeout(self._config.timeout_s):
            if inspect.iscoroutinefunction(function):
                step = await function(argument)
            else:
                step = await asyncio.to_thread(function, argument)
        if not isinstance(step, Step):
            raise TypeError(f"{function.__qualname__} returned {step!r}; it must return a Step")
        return step

    async def _run_agent(self, agent: Agent, talk: Conversation, prompt: Prompt) -> Score:
        assert self._server is not None
        session = await self._server.open(talk, self._config.max_turns, self._chat)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                result = agent(prompt, session)
                score = normalised(await result if inspect.isawaitable(result) else result)
        finally:
            self._server.forget(session)
        if session.error is not None:
            raise session.error
        if score.value is not None:
            talk.reward_last(score.value)
        return score

    def _chat(self, tools: Sequence[dict]) -> ChatFormat:
        key = repr(tools)
        if key not in self._chats:
            if len(self._chats) >= MAX_FORMATS:
                self._chats.clear()
            self._chats[key] = ChatFormat(self._tokenizer, tools)
        return self._chats[key]


def _finished(talk: Conversation, score: Score | None) -> Episode:
    if not talk.outputs:
        # Nothing was written, so there is nothing to hand in: the sample is impossible.
        reason = score.reason if score else "the policy was never asked"
        raise EpisodeFailed(reason)
    output, written = talk.result()
    completion = Completion(
        text=output.text,
        token_ids=tuple(output.token_ids.tolist()),
        finish_reason=output.finish_reason,
        turns=tuple(talk.messages),
    )
    return Episode(output=output, written=written, completion=completion, score=score)


class EpisodeFailed(Exception):
    """An episode that ended before the policy wrote a token, with the reason."""

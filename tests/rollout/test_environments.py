"""What is trained is what was sampled, whoever talks to the policy; bad environments are data."""

import asyncio
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.records import (
    Completion,
    Message,
    Prompt,
    SamplingParams,
    Version,
    VersionSpan,
)
from slipstream.kernels.models import load_tokenizer
from slipstream.rollout.config import EnvironmentConfig
from slipstream.rollout.engine import GenerationOutput, GenerationRequest
from slipstream.rollout.environments.base import load_environment, state_hash
from slipstream.rollout.environments.chat import ChatFormat
from slipstream.rollout.environments.conversation import Conversation
from slipstream.rollout.environments.endpoint import EndpointServer
from slipstream.rollout.environments.episode import EpisodeFailed, Player
from slipstream.rollout.environments.games import Countdown, Sudoku, evaluate, gem_world
from slipstream.rollout.environments.tools import Tools, calculator, schema_of

TINY = Path(__file__).parents[2] / "kernels" / "tiny"
PROMPT = Prompt(
    uid=3, source_id="t/3", task="t", messages=(Message(role="user", content="you 1 2 gem 3 4"),)
)

ENVIRONMENTS = """
import asyncio, json, os, time, urllib.request
from slipstream.rollout.environments.base import Step

class Talk:
    def __init__(self, mode="fine", turns=3):
        self.mode, self.left = mode, turns
    async def reset(self, prompt):
        if self.mode == "reset":
            raise ValueError("no world")
        return Step(state="start")
    async def step(self, action):
        self.left -= 1
        if self.mode == "raise" and self.left == 1:
            raise ValueError("broke")
        if self.mode == "hang":
            await asyncio.sleep(1000)
        if self.mode == "wrong":
            return "nothing"
        unscored = self.mode == "unscored"
        reward = None if unscored else float("nan") if self.mode == "nan" else 0.25
        return Step(observation=f"go on {self.left}", reward=reward, done=self.left == 0,
                    state={"left": self.left})

class Blocking(Talk):
    def reset(self, prompt):
        return Step()
    def step(self, action):
        time.sleep(1.0 if self.mode == "hang" else 0)
        return Step(reward=1.0, done=True)

def ask(endpoint, messages, key=None):
    request = urllib.request.Request(endpoint.base_url + "/chat/completions",
        data=json.dumps({"model": endpoint.model, "messages": messages}).encode(),
        headers={"Authorization": f"Bearer {key or endpoint.api_key}"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)["choices"][0]["message"]

async def agent(prompt, endpoint):
    chat = [{"role": m.role, "content": m.content} for m in prompt.messages]
    for turn in range(4):
        chat.append(await asyncio.to_thread(ask, endpoint, chat))
        chat.append({"role": "user", "content": f"and then {turn}?"})
    return 0.5

async def careless(prompt, endpoint):
    messages = [{"role": each.role, "content": each.content} for each in prompt.messages]
    for _ in range(2):
        try:
            messages.append(await asyncio.to_thread(ask, endpoint, messages))
        except urllib.error.HTTPError as error:
            assert error.code == 500
        messages.append({"role": "user", "content": "Sure?"})
    return 1.0

async def rewriting(prompt, endpoint):
    chat = [{"role": "user", "content": "you 1 1 gem 2 2"}]
    answer = await asyncio.to_thread(ask, endpoint, chat)
    try:
        await asyncio.to_thread(ask, endpoint, [*chat, {**answer, "content": "other"}, chat[0]])
    except urllib.error.HTTPError as error:
        return float(error.code == 409 and "message 1 differs" in error.read().decode())
"""


@pytest.fixture
async def play(tiny, tmp_path):
    """`play(name, prompt, tokens=..., **config)` -> episode, by a tiny random policy."""
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    (tmp_path / "mine.py").write_text(ENVIRONMENTS)
    engine = tiny.engine(folder)
    manifest = tiny.publish(tiny.policy(folder, 1), 0)
    await engine.load(manifest)
    players = []

    async def run(name, prompt=PROMPT, key=7, tokens=64, **config):
        name = f"{tmp_path}/mine.py:{name}" if name[0].isupper() or name in MINE else name
        settings = {"max_turn_tokens": 6, "timeout_s": 20, "show_budget": False, **config}
        player = Player(EnvironmentConfig(name=name, **settings), load_tokenizer(folder))
        players.append(player)
        sampling = SamplingParams(max_new_tokens=tokens)
        request = GenerationRequest(
            request_id=f"r{key}", prompt_token_ids=(), sampling=sampling, sample_key=key
        )
        sent = []

        class Recording:
            async def generate(self, requests):
                async for output in engine.generate(requests):
                    sent.append((requests[0], output))
                    yield output

        episode = await player.play(Recording(), request, prompt)  # type: ignore
        return episode, sent

    yield run
    for player in players:
        await player.close()


MINE = ("agent", "careless", "rewriting")


def check_exact(episode, sent) -> None:
    """Every token of the trajectory is one that the engine was given or wrote, where it was."""
    written = episode.written
    for request, output in sent:
        start = len(request.prompt_token_ids)
        end = start + len(output.token_ids)
        assert written.token_ids[:start].tolist() == list(request.prompt_token_ids)
        assert written.token_ids[start:end].tolist() == output.token_ids.tolist()
        assert written.policy_mask[start:end].all()
    wrote = sum(len(output.token_ids) for _, output in sent)
    assert written.policy_mask.sum() == wrote == len(episode.output.behaviour_logprobs)
    logprobs = np.concatenate([output.behaviour_logprobs for _, output in sent])
    np.testing.assert_array_equal(episode.output.behaviour_logprobs, logprobs)
    assert sum(span.length for span in episode.output.versions) == wrote
    ends = [turn.end for turn in written.turns]
    assert [turn.start for turn in written.turns] == [0, *ends[:-1]]
    assert ends[-1] == len(written.token_ids)


async def test_turns_rewards_and_states_are_recorded_where_they_happened(play):
    episode, sent = await play("Talk")
    check_exact(episode, sent)
    roles = [turn.role for turn in episode.written.turns]
    assert roles == ["prompt", "policy", "observation", "policy", "observation", "policy"]
    policy = [turn for turn in episode.written.turns if turn.role == "policy"]
    assert [turn.reward for turn in policy] == [0.25] * 3
    assert {request.conversation for request, _ in sent} == {"r7"}  # so that its keys are kept
    hashes = [state_hash(state) for state in ("start", {"left": 2}, {"left": 1})]
    assert [turn.state_hash for turn in policy] == hashes
    assert (episode.score.value, episode.score.components["turns"]) == (0.75, 3.0)
    again, _ = await play("Talk")
    assert again.written.token_ids.tolist() == episode.written.token_ids.tolist()
    other, _ = await play("Talk", key=8)
    assert other.written.token_ids.tolist() != episode.written.token_ids.tolist()


@pytest.mark.parametrize(("tokens", "max_turns", "turns"), [(8, 8, 2), (64, 2, 2), (3, 8, 1)])
async def test_budgets_of_tokens_and_turns_end_an_episode(play, tokens, max_turns, turns):
    episode, sent = await play("Talk", tokens=tokens, max_turns=max_turns, arguments={"turns": 99})
    check_exact(episode, sent)
    assert len(sent) <= max(turns, tokens)
    assert len(episode.output.token_ids) <= tokens
    assert len(sent) <= max_turns


async def test_the_budget_is_shown(play):
    episode, _ = await play("Talk", show_budget=True, max_turns=3)
    said = [m.content for m in episode.completion.turns if m.role == "user"]
    assert [text.rpartition("\n")[2] for text in said[1:]] == [
        f"(turns left: {n})" for n in (3, 2, 1)
    ]


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("Talk", "raise", "the environment raised ValueError: broke"),
        ("Talk", "hang", "took longer than environment.timeout_s = 0.3 s"),
        ("Talk", "wrong", "must return a Step"),
        ("Talk", "nan", "returned nan; it must be finite"),
        ("Blocking", "hang", "took longer than environment.timeout_s = 0.3 s"),
    ],
)
async def test_an_environment_that_fails_fails_its_sample_with_the_reason(play, name, mode, reason):
    episode, _ = await play(name, timeout_s=0.3, arguments={"mode": mode})
    assert (episode.score.status, episode.score.value) == ("reward_failed", None)
    assert reason in episode.score.reason


async def test_an_environment_that_never_begins_makes_the_sample_impossible(play):
    with pytest.raises(EpisodeFailed, match="no world"):
        await play("Talk", arguments={"mode": "reset"})


async def test_without_rewards_of_its_own_the_episode_is_left_to_the_reward(play):
    episode, _ = await play("Talk", arguments={"mode": "unscored"})
    assert episode.score is None
    assert episode.completion.turns[0] == PROMPT.messages[0]
    assert isinstance(episode.completion, Completion)


async def test_an_agent_over_http_yields_token_exact_trajectories(play):
    async def one(key):
        check_exact(*await play("agent", key=key))

    await asyncio.gather(*(one(key) for key in range(5)))
    episode, sent = await play("agent")
    assert len(sent) == 4
    assert episode.score.value == 0.5
    assert [t.reward for t in episode.written.turns if t.role == "policy"] == [0, 0, 0, 0.5]


@pytest.mark.slow
async def test_a_thousand_turns_over_http_drift_by_no_token(play):
    turns = 0
    for key in range(250):
        episode, sent = await play("agent", key=key)
        check_exact(episode, sent)
        turns += len(sent)
    assert turns == 1000


async def test_a_conversation_rewritten_by_the_agent_is_refused(play):
    episode, _ = await play("rewriting")
    assert episode.score.value == 1.0


@pytest.mark.parametrize(
    ("path", "key", "body", "status"),
    [
        ("/v1/models", "right", b"{}", 404),
        ("/v1/chat/completions", "wrong", b"{}", 401),
        ("/v1/chat/completions", "right", b"not json", 400),
        ("/v1/chat/completions", "right", b'{"messages": [{"role": "god", "content": ""}]}', 400),
        ("/v1/chat/completions", "right", b'{"messages": [], "stream": true}', 400),
    ],
)
async def test_the_endpoint_refuses_what_it_cannot_serve(path, key, body, status):
    server = EndpointServer()
    request = GenerationRequest(
        request_id="r", prompt_token_ids=(), sampling=SamplingParams(), sample_key=1
    )
    talk = Conversation(None, None, request, 0)  # type: ignore
    session = await server.open(talk, 3, None)  # type: ignore
    url = session.base_url.removesuffix("/v1") + path
    token = session.api_key if key == "right" else "guess"

    def post():
        headers = {"Authorization": f"Bearer {token}"}
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10)
        assert "message" in json.loads(caught.value.read())["error"]
        return caught.value.code

    assert await asyncio.to_thread(post) == status
    server.forget(session)
    await server.close()


LOOK_UP = {
    "type": "function",
    "function": {"name": "look_up", "description": "A word's meaning", "parameters": {}},
}
CALL = '<tool_call>{"name": "look_up", "arguments": {"word": "gem"}}</tool_call>'


@pytest.fixture
async def scripted():
    """`scripted(answers)` -> a session whose policy writes them, and what the engine was sent."""
    tokenizer, servers = load_tokenizer(TINY), []

    async def open_(*answers, turns=8):
        server, sent, left = EndpointServer(), [], list(answers)
        servers.append(server)

        async def generate(request):
            text = left.pop(0)
            ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
            sent.append(request)
            span = (VersionSpan(version=Version(branch=0, step=0), length=len(ids)),)
            return GenerationOutput(
                request_id=request.request_id, token_ids=ids, text=text, versions=span,
                behaviour_logprobs=np.zeros(len(ids), np.float32), kv_version_min=span,
                finish_reason="stop", first_token_s=0.0, finished_s=0.0,
                removed_mass=np.zeros(len(ids), np.float32),
            )  # fmt: skip

        request = GenerationRequest(
            request_id="r", prompt_token_ids=(), sample_key=1,
            sampling=SamplingParams(max_new_tokens=500),
        )  # fmt: skip
        talk = Conversation(generate, ChatFormat(tokenizer), request, 0)
        session = await server.open(talk, turns, lambda tools: ChatFormat(tokenizer, tools))

        async def post(messages, **more):
            body = json.dumps({"messages": messages, **more}).encode()
            headers = {"Authorization": f"Bearer {session.api_key}"}
            request = urllib.request.Request(f"{session.base_url}/chat/completions", body, headers)
            try:
                with await asyncio.to_thread(urllib.request.urlopen, request, timeout=10) as answer:
                    return json.load(answer)["choices"][0]
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)["error"]["message"]

        return post, talk, sent

    yield open_
    for server in servers:
        await server.close()


async def test_calls_that_the_policy_writes_reach_the_agent_as_openai_tool_calls(scripted):
    post, talk, sent = await scripted(f"I look. {CALL}", "A stone.", "Yes.")
    messages = [{"role": "user", "content": "What is a gem?"}]
    choice = await post(messages, tools=[LOOK_UP])
    assert choice["finish_reason"] == "tool_calls"
    answer = choice["message"]
    (call,) = answer["tool_calls"]
    assert answer["content"] == "I look."
    assert call["type"] == "function"
    assert call["function"]["name"] == "look_up"
    assert json.loads(call["function"]["arguments"]) == {"word": "gem"}
    messages += [answer, {"role": "tool", "tool_call_id": call["id"], "content": "a stone"}]
    assert (await post(messages, tools=[]))[0] == 409  # other tools: another episode
    choice = await post(messages, tools=[LOOK_UP])
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "A stone.")
    assert "tool_calls" not in choice["message"]
    forged = json.loads(json.dumps([*messages, choice["message"]]))
    forged[1]["tool_calls"][0]["function"]["arguments"] = "{}"
    forged.append({"role": "user", "content": "Sure?"})
    assert (await post(forged, tools=[LOOK_UP]))[0] == 409
    tokenizer = load_tokenizer(TINY)
    text = str(tokenizer.decode(talk.token_ids))
    assert "look_up" in text.partition("What is a gem?")[0]  # shown to the policy
    assert CALL in text  # and trained as it was written
    assert list(sent[1].prompt_token_ids[: len(sent[0].prompt_token_ids)]) == list(
        sent[0].prompt_token_ids
    )


async def test_what_goes_wrong_in_the_endpoint_fails_the_episode_whatever_the_agent_makes_of_it(
    play, monkeypatch
):
    """An agent that takes every answer for the model's, and scores 1."""

    def cannot(self, messages, last_token):
        raise ConfigError("the template knows no such role")

    monkeypatch.setattr(ChatFormat, "follow", cannot)
    episode, sent = await play("careless")
    assert (episode.score.status, len(sent)) == ("reward_failed", 1)
    assert "the template knows no such role" in episode.score.reason


async def test_without_tools_the_agent_gets_the_text_as_it_was_written(scripted):
    broken = "<tool_call>not json</tool_call>"
    post, talk, _ = await scripted(CALL, broken)
    messages = [{"role": "user", "content": "?"}]
    assert (await post(messages))["message"]["content"] == CALL
    post, talk, _ = await scripted(broken)
    assert (await post(messages, tools=[LOOK_UP]))["message"]["content"] == broken
    assert len(talk.outputs) == 1


async def test_used_up_turns_and_tokens_are_told_in_words_that_agents_know(scripted):
    post, talk, _ = await scripted("One.", "Two.", turns=1)
    messages = [{"role": "user", "content": "?"}]
    messages += [(await post(messages))["message"], {"role": "user", "content": "?"}]
    code, why = await post(messages)
    assert (code, "max_turns" in why) == (429, True)
    post, talk, _ = await scripted("One.", "Two.")
    messages = [{"role": "user", "content": "?"}]
    messages += [(await post(messages))["message"], {"role": "user", "content": "?"}]
    talk.request = msgspec.structs.replace(
        talk.request, sampling=SamplingParams(max_new_tokens=len(talk.outputs[0].token_ids))
    )
    code, why = await post(messages)
    assert (code, "exceeds the model's context length" in why) == (400, True)


def test_a_template_that_rewrites_answers_is_refused():
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ConfigError, match="drops or rewrites"):
        ChatFormat(tokenizer).follow(PROMPT.messages, 2)


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|pad|>"])
def test_following_tokens_are_those_that_the_template_writes_behind_the_answer(eos):
    """Also where samples end by what the tokenizer does not call its end token."""
    tokenizer = load_tokenizer(TINY)
    end: Any = tokenizer.eos_token_id
    template: Any = tokenizer.chat_template
    tokenizer.chat_template = template.replace("eos_token", "'<|im_end|>'")
    tokenizer.eos_token = eos
    chat = ChatFormat(tokenizer)
    answer = tokenizer("north", add_special_tokens=False)["input_ids"]
    more = (Message(role="user", content="you 1 3"),)
    whole = [*PROMPT.messages, Message(role="assistant", content="north"), *more]
    said = chat.first(PROMPT.messages)
    assert [*said, *answer, end, *chat.follow(more, end)] == chat.first(whole)
    assert [*said, *answer, *chat.follow(more, answer[-1])] == chat.first(whole)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("countdwn", {}, r"not a registered environment \(did you mean 'countdown'\?\)"),
        ("sudoku", {"mistake": 1}, "do not fit"),
        ("math:sin", {}, "is neither a class with reset"),
        ("tools", {"tools": ["math:pi"]}, "is not a function"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_environment(EnvironmentConfig(name=name, arguments=arguments))


async def test_countdown_says_what_is_wrong_and_pays_the_target_once():
    game = Countdown()
    data = {"metadata": {"numbers": [2, 3, 4], "target": 14}}
    prompt = Prompt(uid=1, source_id="c", task="countdown", messages=(), payload=data)
    await game.reset(prompt)
    for text, said in [
        ("2 + 3", "2 + 3 = 5, not 14. Try again."),
        ("7 * 2", "Use each given number at most once. Try again."),
        ("__import__('os')", "only integers"),
        ("<answer>2 * (3 + 4) - 1 / 0</answer>", "cannot be computed"),
        ("", "cannot be computed"),
    ]:
        step = await game.step(text)
        assert (step.reward, step.done) == (0.0, False)
        assert said in step.observation
    step = await game.step("so <answer>2 * (3 + 4) = 14</answer>")
    assert (step.reward, step.done) == (1.0, True)


async def test_sudoku_pays_for_right_cells_only_and_ends():
    data = {"metadata": {"puzzle": [[1, 0], [0, 1]], "solution": [[1, 2], [2, 1]]}}
    prompt = Prompt(uid=1, source_id="s", task="sudoku", messages=(), payload=data)
    game = Sudoku(mistakes=2)
    await game.reset(prompt)
    assert (await game.step("1 2 1")).reward == 0.0
    assert (await game.step("row 1 column 2: 2")).reward == 0.5
    last = await game.step("2 1 2")
    assert (last.reward, last.done) == (0.5, True)
    await (game := Sudoku(mistakes=1)).reset(prompt)
    assert (await game.step("9 9 9")).done


async def test_tools_are_called_told_about_errors_and_counted():
    tools = Tools(max_calls=2)
    await tools.reset(PROMPT)
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'
    step = await tools.step(call % "2 * (3 + 4)")
    assert step.observation == "14\n(tool calls left: 1)"
    assert (step.role, step.reward, step.done) == ("tool", None, False)
    assert "error: ValueError" in (await tools.step(call % "2 **")).observation
    assert "no tool calls are left" in (await tools.step(call % "1")).observation
    assert (await tools.step("The answer is 14")).done
    assert "error: not a call" in await Tools()._call('{"name": "rm"}')


def test_a_tool_is_described_by_its_signature():
    def look_up(word: str, limit: int | None = None, tags: list[str] = []) -> str:  # noqa: B006
        """Find a word."""
        return word

    assert schema_of(look_up)["function"] == {
        "name": "look_up",
        "description": "Find a word.",
        "parameters": {
            "type": "object",
            "required": ["word"],
            "properties": {
                "word": {"type": "string"},
                "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
        },
    }
    text = load_tokenizer(TINY)
    shown = text.decode(ChatFormat(text, [schema_of(calculator)]).first(PROMPT.messages))
    assert "calculator" in str(shown)


@pytest.mark.parametrize("text", ["(" * 400 + "1" + ")" * 400, "9" * 600, "1//2", "x", "2**9", ""])
def test_expressions_that_are_not_arithmetic_are_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        evaluate(text)


def test_a_gem_world_is_the_same_for_a_seed_and_never_solved_at_the_start():
    for seed in range(50):
        world = gem_world(seed)
        assert world == gem_world(seed)
        assert world["here"] != world["gem"]

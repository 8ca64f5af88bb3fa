"""Every registered reward keeps its promises; every accepted form works; bad ones are named."""

import math
import random
import re
from importlib.metadata import entry_points

import msgspec
import numpy as np
import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.records import Completion, Message, Prompt, Score
from slipstream.rollout.config import RewardConfig
from slipstream.rollout.rewards.base import ENTRY_POINT_GROUP, load_reward, normalised
from slipstream.rollout.rewards.math_answer import MathAnswer
from slipstream.rollout.rewards.pattern import PatternMatch
from slipstream.rollout.rewards.reasoning_gym import ReasoningGym

REGISTERED = sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP))
WITH_EXAMPLES = [
    "code_tests", "exact_match", "format", "json_schema", "length", "math_answer", "pattern",
    "reasoning_gym",
]  # fmt: skip
NEED_AN_ANSWER = ["exact_match", "math_answer", "pattern", "reasoning_gym"]
DONE = Completion(text="the answer", token_ids=(1, 2))


def prompt(**payload) -> Prompt:
    messages = (Message(role="system", content="s"), Message(role="user", content="why?"))
    return Prompt(uid=1, source_id="t/1", task="t", messages=messages, payload=payload)


def load(name, **arguments):
    return load_reward(RewardConfig(name=str(name), arguments=arguments))


def written(tmp_path, code, name="reward"):
    file = tmp_path / "mine.py"
    file.write_text(code)
    return load(f"{file}:{name}")


def test_ours_are_registered():
    assert sorted([*WITH_EXAMPLES, "classifier", "http", "judge", "sum"]) == REGISTERED


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_hold_golden_cases_that_score_1_and_near_misses_that_do_not(name):
    (point,) = entry_points(group=ENTRY_POINT_GROUP, name=name)
    examples = point.load().examples()
    assert {example.correct for example in examples} == {True, False}
    reward = load(name)
    for example in examples:
        score = reward(example.completion, example.prompt)
        assert score.status == "scored", (example, score)
        assert (score.value == 1.0) == example.correct, (example, score)
        assert 0.0 <= (score.value or 0.0) <= 1.0


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_a_score_is_deterministic_and_crosses_the_wire(name):
    (point,) = entry_points(group=ENTRY_POINT_GROUP, name=name)
    first, second = load(name), load(name)
    for example in reversed(point.load().examples()):
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(example), type=type(example))
        score = first(example.completion, example.prompt)
        assert score == second(sent.completion, sent.prompt) == first(sent.completion, sent.prompt)


@pytest.mark.parametrize("name", NEED_AN_ANSWER)
def test_a_prompt_without_an_answer_is_a_failure_not_a_zero(name):
    score = load(name)(DONE, prompt(question="?"))
    assert (score.status, score.value) == ("reward_failed", None)
    assert "payload has no answer" in score.reason


def test_the_pattern_takes_the_last_match_and_scores_none_as_zero():
    reward = load("pattern", pattern=r"\[(?P<x>\w+)=(\d+)\]", group=2)
    assert reward(Completion(text="[a=1][b=2]"), prompt(answer=2)).value == 1
    assert reward(Completion(text="a=2"), prompt(answer=2)) == Score(
        value=0.0, reason="the pattern matches nothing"
    )
    named = load("pattern", pattern=r"\[(?P<x>\w+)=(\d+)\]", group="x", ignore_case=True)
    assert named(Completion(text="[A=1]"), prompt(answer="a")).value == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "a", "group": 1}, "no group 1"),
        ({"patern": "a"}, r"unexpected keyword argument 'patern'.*it takes \(\*, pattern"),
    ],
)
def test_reward_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load("pattern", **arguments)


def test_reasoning_gym_gives_part_of_the_score_unless_it_must_be_exact():
    entry = {"question": "?", "answer": "214", "metadata": {}}
    chain_sum = msgspec.structs.replace(prompt(**entry), task="chain_sum")
    text = Completion(text="It is 214")
    assert load("reasoning_gym")(text, chain_sum).value == pytest.approx(3 / 9)
    exact = load("reasoning_gym", exact=True)(text, chain_sum)
    assert (exact.value, exact.components["task_score"]) == (0.0, pytest.approx(3 / 9))
    extract = load("reasoning_gym", extract=r"It is (\d+)", exact=True)
    assert extract(text, chain_sum).value == 1
    assert extract(Completion(text="214"), chain_sum) == Score(
        value=0.0, reason="no answer was found"
    )


@pytest.mark.parametrize("extract", ["(", "no group"])
def test_reasoning_gym_refuses_an_extraction_that_cannot_work(extract):
    with pytest.raises(ConfigError, match="extract "):
        load("reasoning_gym", extract=extract)


@pytest.mark.parametrize(
    "code",
    [
        "def reward(completion, prompt): return prompt.payload['k'] / 4",
        "def reward(prompt, completion, scale=4): return prompt.payload['k'] / scale",
        "async def reward(completion, prompt): return prompt.payload['k'] / 4",
        "def reward(completion): return len(completion.text) / 20",
        "class reward:\n  def score(self, completion, prompt): return 0.5",
        "class reward:\n  def __call__(self, completion, prompt): return 0.5",
        "class reward:\n  def __call__(self, completions, **columns): return [0.5]",
        "def reward(completions, **columns): return [columns['k'][0] / 4]",
        "def reward(prompts, completions, k): return [x / 4 for x in k]",
        "async def reward(prompts, completions, k, **_): return [x / 4 for x in k]",
        "def reward(completions, completion_ids): return [len(completion_ids[0]) / 4]",
        "def reward(prompts, completions): return [0.5 * (prompts == ['why?'])]",
        "import numpy\ndef reward(completion, prompt): return numpy.float32(0.5)",
        "import torch\ndef reward(completions, **columns): return torch.tensor([0.5])",
        "from slipstream.buffer.records import Score\n"
        "def reward(completion, prompt): return Score(value=0.5)",
    ],
)
def test_every_accepted_form_scores(tmp_path, code):
    assert written(tmp_path, code)(DONE, prompt(k=2)) == Score(value=0.5)


def test_trl_functions_see_a_chat_when_the_data_holds_one(tmp_path):
    code = (
        "def reward(prompts, completions, answer, **columns):\n"
        "    assert prompts[0][-1] == {'role': 'user', 'content': 'why?'}, prompts\n"
        "    assert 'conversational' not in columns\n"
        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]\n"
    )
    chat = prompt(answer="the answer", conversational=True)
    assert written(tmp_path, code)(DONE, chat) == Score(value=1.0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def reward(completion, prompt): 1 / 0", r"ZeroDivisionError: .*mine.py:1"),
        ("def reward(completion, prompt): raise SystemExit(3)", "raised SystemExit"),
        ("async def reward(completion, prompt): 1 / 0", "ZeroDivisionError"),
        ("def reward(completion, prompt): return float('nan')", "returned nan; it must be finite"),
        ("def reward(completion, prompt): return float('-inf')", "returned -inf"),
        ("def reward(completion, prompt): pass", "returned None"),
        ("def reward(completion, prompt): return 'good'", "returned a str"),
        ("def reward(completion, prompt): return 1 + 2j", "returned a complex"),
        ("def reward(completions): return [None]", "returned None"),
        ("def reward(completions): return [1.0, 2.0]", "must return a list of one"),
        ("def reward(completions): return 1.0", "must return a list of one"),
        ("def reward(completions, solution): return [1.0]", "it needs solution; the data has .* k"),
        (
            "from slipstream.buffer.records import Score\n"
            "def reward(completion, prompt): return Score(value=None)",
            "returned None",
        ),
    ],
)
def test_a_reward_that_fails_is_recorded_with_its_reason(tmp_path, code, reason):
    score = written(tmp_path, code)(DONE, prompt(k=2))
    assert (score.status, score.value) == ("reward_failed", None)
    assert re.search(reason, score.reason), score.reason


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", r"'exact' is not a registered reward \(did you mean 'exact_match'\?\).* pattern"),
        ("nowhere.at_all:f", r"cannot be imported: ModuleNotFoundError"),
        ("math:sine", r"math has no 'sine' \(did you mean 'sin"),
        ("missing.py:f", r"there is no file .*missing.py"),
        ("math:pi", r"is a float\. Accepted forms: reward\(completion, prompt\)"),
        ("math:sin", r"which is none of the accepted forms"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def reward(text): return 1", r"takes \(text\), which is none of the accepted forms"),
        ("def reward(completion, gold): return 1", "none of the accepted forms"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: .*mine.py:1"),
        ("def reward(:", "cannot be imported: SyntaxError"),
        ("raise SystemExit", "cannot be imported: SystemExit"),
        ("class reward:\n  def __init__(self, k): pass", "missing 1 required positional"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused(tmp_path, code, message):
    with pytest.raises(ConfigError, match=message):
        written(tmp_path, code)


def test_a_function_takes_no_arguments_from_the_config():
    with pytest.raises(ConfigError, match=r"is not a class, so it takes no reward.arguments"):
        load("math:sin", degrees=True)


def test_results_are_finite_numbers_or_failures():
    for number in (1, True, 0.5, np.float64(0.25), np.array(2)):
        assert normalised(number) == Score(value=float(number))
    for nonsense in (math.nan, math.inf, None, "1", [1.0], np.array([1.0, 2.0]), object()):
        assert normalised(nonsense).status == "reward_failed"
    kept = Score(value=0.5, components={"style": 0.1}, reason="shown")
    assert normalised(kept) is kept


def test_classes_can_be_used_without_the_machinery():
    assert PatternMatch(pattern="(.*)").score(Completion(text="x"), prompt(answer="x")).value == 1
    assert ReasoningGym(extract="(.*)").score is not None


def number(chance: random.Random) -> str:
    """A number as models write it."""
    a, b = chance.randint(-60, 60), chance.randint(1, 12)
    return chance.choice([
        str(a), f"{a}.{b}", f"{a}.{b:06d}", f"\\frac{{{a}}}{{{b}}}", f"-\\dfrac{{{a}}}{{{b}}}",
        str(chance.randint(0, 10**14)),
    ])  # fmt: skip


LEADS = (
    "", "So the answer is ", "Answer: ", "answer is: ", "It is 5 of 12. Thus ", "10% of 50 is 5: ",
    "We have 17 apples.\nThe result is ", "Let x = 3, then 4 + 5 = 9. Hence ", "a) 3\nb) 4\n",
    "The answer 4 is wrong. The answer is ", "Final answer: it is ", "The final answer is $3$ or ",
)  # fmt: skip


@pytest.mark.parametrize("count", [pytest.param(400), pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_short_cut_for_numbers_says_what_the_library_says(count, record_property):
    quick, library = MathAnswer(), MathAnswer()
    library._equal_numbers = lambda *_: None  # type: ignore[method-assign]
    chance, short = random.Random(count), 0
    for _ in range(count):
        gold = number(chance)
        given = gold if chance.random() < 0.4 else number(chance)
        box = chance.choice(["$\\boxed{%s}$", "\\boxed{%s}", "$\\boxed{%s}$.", "$ \\boxed{%s}"])
        text = chance.choice(LEADS) + box % given + chance.choice(["", ".", "\n", " or so"])
        sample = Completion(text=text), prompt(answer=chance.choice([gold, f"so\n#### {gold}"]))
        said = quick._equal_numbers(sample[1].payload["answer"], text)
        if said is not None:
            short += 1
            assert library.score(*sample).value == said, (gold, text)
    record_property("short cuts", short)
    assert short > count / 2

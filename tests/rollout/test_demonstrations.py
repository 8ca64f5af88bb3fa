"""Demonstrations: exact sums, training prompts only, clear refusals."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.records import Message, Prompt
from slipstream.learner.config import SftConfig
from slipstream.rollout.config import PromptsConfig
from slipstream.rollout.demonstrations import (
    ANSWERED_SHARE,
    BUILT_IN,
    chain_sum,
    chain_sum_mixed,
    load_demonstrator,
    write_sft_file,
)
from slipstream.rollout.prompts import PromptSource

NARROW = PromptsConfig(
    task_config={"max_terms": 2, "max_digits": 1}, size=300, held_out=50, system="Add."
)


def prompt(question: str, number: int = 0, **payload) -> Prompt:
    message = Message(role="user", content=question)
    return Prompt(uid=0, source_id=f"t/{number}", task="t", messages=(message,), payload=payload)


def test_a_chain_is_summed_term_by_term():
    assert chain_sum(prompt("?", metadata={"expression": "7 - 9 + 4"})) == (
        "7 - 9 = -2\n-2 + 4 = 2\nAnswer: 2"
    )
    assert chain_sum(prompt("What is 7 - -9 + -4 in all? 12 times!")) == (
        "7 - -9 = 16\n16 + -4 = 12\nAnswer: 12"
    )
    assert chain_sum(prompt("?", metadata={"expression": "-5"})) == "Answer: -5"


@given(
    first=st.integers(-(10**12), 10**12),
    rest=st.lists(st.tuples(st.sampled_from("+-"), st.integers(-(10**12), 10**12)), max_size=12),
)
def test_sums_are_exact_for_any_number_of_terms(first, rest):
    expression = " ".join([str(first), *(f"{sign} {term}" for sign, term in rest)])
    *lines, last = chain_sum(prompt("?", metadata={"expression": expression})).splitlines()
    total = eval(expression)
    assert last == f"Answer: {total}"
    assert len(lines) == len(rest)
    for line in lines:
        left, right = line.split(" = ")
        assert eval(left) == int(right)


def test_the_mixed_demonstrator_answers_a_fixed_share_and_always_shows_its_work():
    texts = [chain_sum_mixed(prompt("1 + 2 + 3", number)) for number in range(400)]
    answered = [text.endswith("\nAnswer: 6") for text in texts]
    assert abs(sum(answered) / 400 - ANSWERED_SHARE) < 0.1
    assert all(text.startswith("1 + 2 = 3\n3 + 3 = 6") for text in texts)
    assert texts == [chain_sum_mixed(prompt("1 + 2 + 3", number)) for number in range(400)]
    assert {chain_sum_mixed(prompt("7", number)) for number in range(9)} == {"Answer: 7"}


def test_sft_examples_are_training_prompts_with_right_answers_never_held_out(tmp_path):
    sft = SftConfig(demonstration="chain_sum", examples=700)
    assert write_sft_file(NARROW, sft, 0, tmp_path / "sft.jsonl") == 700
    lines = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert len(lines) == 700
    assert [message["role"] for message in lines[0]["messages"]] == ["system", "user", "assistant"]
    source = PromptSource(NARROW, 0)
    held_out = {p.messages[-1].content for p in source.held_out()}
    answers = {
        p.messages[-1].content: p.payload["answer"] for p in map(source.prompt, range(len(source)))
    }
    for line in lines:
        question, text = (message["content"] for message in line["messages"][1:])
        assert question not in held_out
        assert text.endswith(f"Answer: {answers[question]}")


def test_the_first_examples_are_not_the_runs_first_prompts(tmp_path):
    sft = SftConfig(demonstration="answer", examples=10)
    write_sft_file(NARROW, sft, 0, tmp_path / "sft.jsonl")
    first = json.loads((tmp_path / "sft.jsonl").read_text().splitlines()[0])["messages"][1]
    assert first["content"] == PromptSource(NARROW, 0).prompt(299).messages[-1].content


def test_a_demonstrator_of_ones_own_is_found_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("def show(prompt): return prompt.payload['answer'] + '!'")
    demonstrate = load_demonstrator(f"{tmp_path}/mine.py:show")
    assert demonstrate(prompt("?", answer="4")) == "4!"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "chain_sums",
            r"not built in \(did you mean 'chain_sum'\?\)\. There are: answer",
        ),
        ("nowhere:f", "sft.demonstration = 'nowhere:f' cannot be imported"),
        ("math:sine", r"math has no 'sine' \(did you mean 'sin"),
        ("math:pi", "is a float, no function"),
        ("math:sin", r"on prompt chain_sum/\d+ raised TypeError"),
        ("builtins:len", r"on prompt chain_sum/\d+ "),
        ("builtins:id", r"on prompt chain_sum/\d+ returned \d+; it must return a text"),
    ],
)
def test_a_demonstrator_that_cannot_work_is_refused(tmp_path, name, message):
    sft = SftConfig(demonstration=name, examples=1)
    with pytest.raises(ConfigError, match=message):
        write_sft_file(NARROW, sft, 0, tmp_path / "sft.jsonl")


def test_a_prompt_that_is_no_sum_is_refused_by_name(tmp_path):
    words = PromptsConfig(task="spell_backward", size=10, held_out=0)
    sft = SftConfig(demonstration="chain_sum", examples=1)
    with pytest.raises(ConfigError, match=r"spell_backward/\d .*the question holds no sum"):
        write_sft_file(words, sft, 0, tmp_path / "sft.jsonl")
    assert set(BUILT_IN) == {"answer", "chain_sum", "chain_sum_mixed"}


def test_a_file_of_ones_own_becomes_the_chats_the_learner_reads(tmp_path):
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    own = tmp_path / "own.jsonl"
    lines = [{"messages": chat, "source": "x"}, {"prompt": "2+2\u2028", "completion": "4"}]
    own.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    sft = SftConfig(data=str(own), examples=1)
    assert write_sft_file(NARROW, sft, 0, tmp_path / "sft.jsonl") == 2
    written = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert written[0] == {"messages": chat}
    assert written[1]["messages"] == [
        {"role": "system", "content": "Add."},  # as before the run's own prompts
        {"role": "user", "content": "2+2\u2028"},
        {"role": "assistant", "content": "4"},
    ]


GOOD = '{"prompt": "1+1", "completion": "2"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"sft\.data = .*own\.jsonl.* cannot be read: No such file"),
        ("", "holds no examples"),
        ("\n \n", "holds no examples"),
        (f"{GOOD}\n{{", "line 2: "),
        (f"{GOOD}\n\n[]", "line 3: it is a list"),
        ('{"prompt": "1+1"}', "line 1: it needs `messages`, or `prompt` and `completion`.*prompt"),
        ('{"prompt": "1+1", "completion": ""}', "line 1: .*not empty"),
        ('{"messages": [{"role": "assistant", "content": "2"}]}', "line 1: .*two or more"),
        ('{"messages": [{"role": "user", "content": "2"}, 3]}', "line 1: each message needs"),
        (
            '{"messages": [{"role": "user", "content": "2"}, {"role": "user", "content": "3"}]}',
            "line 1: the last message must be the assistant's",
        ),
    ],
)
def test_a_file_that_holds_no_examples_is_refused_with_its_line(tmp_path, text, message):
    own = tmp_path / "own.jsonl"
    if text is not None:
        own.write_text(text)
    with pytest.raises(ConfigError, match=message):
        write_sft_file(NARROW, SftConfig(data=str(own)), 0, tmp_path / "sft.jsonl")

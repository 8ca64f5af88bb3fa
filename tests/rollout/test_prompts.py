"""The stream: any uid at any time, never a held-out text; bad data is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.records import Completion, Prompt
from slipstream.rollout.config import PromptsConfig
from slipstream.rollout.plain import plain
from slipstream.rollout.prompts import HELD_OUT_UIDS, PromptSource, normalised_text
from slipstream.rollout.rewards.reasoning_gym import ReasoningGym
from slipstream.rollout.tasks import make_task

# 200 texts in all ("a + b", "a - b" with digits), so that held-out texts come up all the time.
NARROW = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def reasoning_gym(**changes) -> PromptsConfig:
    return PromptsConfig(**{"task_config": NARROW, "size": 300, "held_out": 50, **changes})


def dataset(path, **changes) -> PromptsConfig:
    return PromptsConfig(**{"source": "dataset", "path": str(path), "held_out": 4, **changes})


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def questions(tmp_path):
    # Every question twice, differing in white space only.
    rows = [{"prompt": f"What  is {n % 20}?", "answer": n % 20, "hint": n} for n in range(39)]
    rows.append({"prompt": "What is 19?", "answer": 19, "hint": 39})
    return write_jsonl(tmp_path / "questions.jsonl", rows)


def text_of(prompt: Prompt) -> str:
    return normalised_text(prompt.messages[-1].content)


def test_a_prompt_depends_on_its_uid_alone_whatever_was_asked_before():
    config = reasoning_gym()
    forward, jumping = PromptSource(config, 3), PromptSource(config, 3)
    uids = [0, 299, 300, 7, 899, 5, 301, 0]
    expected = {uid: forward.prompt(uid) for uid in sorted(uids)}
    assert [jumping.prompt(uid) for uid in uids] == [expected[uid] for uid in uids]


def test_another_process_with_another_hash_seed_makes_the_same_stream():
    script = (
        "from slipstream.rollout.config import PromptsConfig\n"
        "from slipstream.rollout.prompts import PromptSource\n"
        "import msgspec, sys\n"
        f"config = PromptsConfig.model_validate_json({reasoning_gym().model_dump_json()!r})\n"
        "source = PromptSource(config, 3)\n"
        "prompts = [source.prompt(uid) for uid in range(290, 310)] + list(source.held_out())\n"
        "sys.stdout.buffer.write(msgspec.msgpack.encode(prompts))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        check=True,
    )
    source = PromptSource(reasoning_gym(), 3)
    ours = [source.prompt(uid) for uid in range(290, 310)] + list(source.held_out())
    assert msgspec.msgpack.decode(run.stdout, type=list[Prompt]) == ours


def test_each_epoch_visits_each_item_once_in_an_order_of_its_own():
    source = PromptSource(reasoning_gym(size=100), 0)
    epochs = [
        [source.prompt(uid).source_id for uid in range(100 * e, 100 * e + 100)] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 100
    assert epochs[0] != epochs[1]
    assert (source.prompt(99).epoch, source.prompt(100).epoch) == (0, 1)


def test_without_shuffling_items_come_in_order():
    source = PromptSource(reasoning_gym(shuffle=False), 0)
    assert [source.prompt(uid).source_id for uid in (0, 1, 301)] == [
        "chain_sum/0",
        "chain_sum/1",
        "chain_sum/1",
    ]


def test_an_item_asks_the_same_in_every_epoch():
    source = PromptSource(reasoning_gym(size=20), 0)
    asked = {}
    for uid in range(100):
        prompt = source.prompt(uid)
        assert asked.setdefault(prompt.source_id, prompt.messages) == prompt.messages


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 5), held_out=st.integers(1, 90))
def test_no_prompt_of_any_epoch_or_seed_has_a_held_out_text(seed, epoch, held_out):
    source = PromptSource(reasoning_gym(held_out=held_out, size=60), seed)
    held_out_texts = {text_of(prompt) for prompt in source.held_out()}
    assert len(held_out_texts) == held_out
    for uid in range(60 * epoch, 60 * epoch + 60):
        assert text_of(source.prompt(uid)) not in held_out_texts


def test_held_out_prompts_are_the_same_for_every_seed_and_numbered_apart():
    first, second = (PromptSource(reasoning_gym(), seed).held_out() for seed in (0, 1))
    assert first == second
    assert [prompt.uid for prompt in first] == list(range(HELD_OUT_UIDS, HELD_OUT_UIDS + 50))


def test_streams_of_neighbouring_seeds_are_not_shifted_copies():
    # reasoning-gym's item i of seed s is item i - 1 of seed s + 1.
    wide = {"min_digits": 4, "max_digits": 4}
    config = reasoning_gym(task_config=wide, held_out=0)
    texts = [
        {text_of(PromptSource(config, seed).prompt(uid)) for uid in range(50)} for seed in (0, 1)
    ]
    assert not texts[0] & texts[1]


def test_a_held_out_dataset_row_takes_its_repetitions_out_of_training(questions):
    source = PromptSource(dataset(questions), 0)
    held_out = {text_of(prompt) for prompt in source.held_out()}
    trained = {text_of(source.prompt(uid)) for uid in range(len(source))}
    assert len(held_out) == 4
    assert len(source) == 40 - 2 * 4
    assert len(trained) == 16
    assert not held_out & trained


def test_other_columns_reach_the_reward_and_the_answer_under_both_names(tmp_path):
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"q": f"{n}?", "gold": n, "k": [n]} for n in range(9)]
    )
    source = PromptSource(dataset(path, prompt_column="q", answer_column="gold"), 0)
    prompt = source.prompt(0)
    number = prompt.payload["k"][0]
    assert prompt.payload == {"gold": number, "k": [number], "answer": number}
    assert prompt.messages[0].content == f"{number}?"


def test_templates_and_system_messages_frame_text_but_leave_a_chat_as_it_is(tmp_path):
    chat = [{"role": "user", "content": "{prompt}?"}]
    rows = [{"prompt": chat, "answer": 1}, {"prompt": "two", "answer": 2}]
    config = dataset(
        write_jsonl(tmp_path / "d.jsonl", rows),
        held_out=0,
        shuffle=False,
        system="Be brief.",
        template="Q: {prompt}",
    )
    source = PromptSource(config, 0)
    contents = [[m.content for m in source.prompt(uid).messages] for uid in (0, 1)]
    assert contents == [["Be brief.", "{prompt}?"], ["Be brief.", "Q: two"]]
    assert source.prompt(0).payload["conversational"] is True


def test_json_parquet_and_saved_folders_give_the_same_prompts_as_jsonl(tmp_path, questions):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "questions.parquet")
    folder = tmp_path / "saved" / "questions"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder))
    paths = [questions, tmp_path / "questions.json", tmp_path / "questions.parquet", folder]
    prompts = [
        [source.prompt(uid) for uid in range(40)] + list(source.held_out())
        for source in (PromptSource(dataset(path), 0) for path in paths)
    ]
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3]
    with pytest.raises(ConfigError, match=r"prompts.split = 'test' is not in .* it has: train"):
        PromptSource(dataset(folder, split="test"), 0)


def test_payloads_survive_the_wire_and_the_tasks_own_score_of_the_gold_answer():
    # Tuples, enums, numpy strings, sets and dictionaries keyed by numbers occur in these.
    for task in ("arc_1d", "rearc", "countdown", "knights_knaves", "course_schedule", "bf"):
        source = PromptSource(reasoning_gym(task=task, task_config={}, held_out=0, size=5), 0)
        sent = source.prompt(0)
        received = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Prompt)
        assert received == sent
        assert ReasoningGym().score(Completion(text=sent.payload["answer"]), received).value == 1


def test_a_composite_task_may_be_written_as_tables():
    parts = [{"name": "chain_sum", "weight": 2.0}, {"name": "gcd"}]
    task = make_task("composite", {"datasets": parts, "seed": 1, "size": 5})
    assert {task[i]["metadata"]["source_dataset"] for i in range(5)} <= {"chain_sum", "gcd"}


def test_plain_data_is_what_msgpack_and_json_carry():
    import numpy as np

    value = {1: (np.int64(2), np.float32(0.5)), "big": 1 << 70, "set": {"b", "a"}, "no": None}
    assert plain(value) == {"1": [2, 0.5], "big": str(1 << 70), "set": ["a", "b"], "no": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chain_sums"}, r"prompts.task = 'chain_sums' .*did you mean 'chain_sum'\?"),
        ({"task_config": {"min_term": 2}}, r"task_config.min_term .*did you mean 'min_terms'\?"),
        ({"task_config": {"seed": 2}}, r"task_config.seed is decided by the run's seed; remove"),
        ({"task_config": {"min_terms": 9}}, r"refused by task 'chain_sum': max_terms must be"),
        ({"held_out": 500}, r"held_out = 500, .* gave only 200 distinct questions"),
        ({"held_out": 200}, r"held_out = 200 leaves nothing to train on"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_with_the_remedy(changes, message):
    with pytest.raises(ConfigError, match=message):
        PromptSource(reasoning_gym(**changes), 0)


def test_a_task_that_hashes_strings_is_refused_until_hashing_is_fixed(monkeypatch):
    config = reasoning_gym(task="ransom_note", task_config={}, held_out=2)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match="start the run with PYTHONHASHSEED=0"):
        PromptSource(config, 0)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert PromptSource(config, 0).prompt(0).task == "ransom_note"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"prompt": "a", "answer": 1}\n{"prompt": \n', r"line 2 of .*d.jsonl is not J"),
        (
            "d.jsonl",
            '{"prompt": "a", "answer": 1}\n[1]\n',
            r"line 2 .* not a JSON object but a list",
        ),
        ("d.jsonl", b"\xff\xfe\n", r"line 1 of .*d.jsonl is not JSON"),
        ("d.jsonl", "", r"has no rows"),
        (
            "d.jsonl",
            '{"promt": "a", "answer": 1}',
            r"'prompt' is not a column of .* \(did you mean 'promt'\?\)\. It has: promt, answer",
        ),
        ("d.jsonl", '{"prompt": "a"}', r'"" when there is no gold answer'),
        (
            "d.jsonl",
            '{"prompt": "a", "answer": 1}\n{"answer": 1}',
            r"row 2 of .*: the prompt is 'None'",
        ),
        (
            "d.jsonl",
            '{"prompt": [{"role": "assistant", "content": "a"}], "answer": 1}',
            r"row 1 .*last message is the assistant's",
        ),
        (
            "d.jsonl",
            '{"prompt": "a", "answer": 1}',
            r"held_out = 4 leaves nothing to train on: .* has 1 distinct",
        ),
        ("d.json", '{"prompt": "a"}', r"must hold a list of JSON objects"),
        ("d.json", '{"prompt": "a"}\n{}', r"name it .jsonl"),
        ("d.parquet", "nonsense", r"cannot be read as Parquet"),
    ],
)
def test_bad_data_is_named_by_file_line_and_remedy(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        PromptSource(dataset(path), 0)


def test_a_missing_file_and_an_unknown_name_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"there is no file .*missing.jsonl"):
        PromptSource(dataset(tmp_path / "missing.jsonl"), 0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"neither a .jsonl, .json or .parquet file nor a folder"):
        PromptSource(dataset("nobody/nothing"), 0)


@pytest.mark.parametrize(
    "module",
    ["rollout.prompts", "rollout.feeder", "rollout.demonstrations", "rollout.rewards.pool"],
)
def test_importing_needs_no_heavy_library(module):
    heavy = "torch transformers reasoning_gym datasets pyarrow math_verify sympy"
    script = (
        f"import sys, slipstream.{module}; print([m for m in {heavy.split()} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

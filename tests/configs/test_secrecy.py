"""What is secret is not saved: an experiment that holds a secret is refused, and never quoted."""

from typing import Any

import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.configs.load import load_table
from slipstream.configs.secrecy import named_variables

KEY = "sk-" + "a1B2" * 8


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"api_key": "letmein"}, "reward.arguments.api_key"),
        ({"headers": {"x-auth": KEY}}, "reward.arguments.headers.x-auth"),
        ({"urls": ["http://joe:letmein@host/score"]}, "reward.arguments.urls.0"),
        ({"hf_token": "letmein"}, "reward.arguments.hf_token"),
        ({"header": f"Bearer {KEY}"}, "reward.arguments.header"),
        ({"query": f"key={KEY}"}, "reward.arguments.query"),
    ],
)
def test_a_secret_among_the_arguments_is_refused_by_its_place_and_not_quoted(
    arguments: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_table({"reward": {"name": "my.py:reward", "arguments": arguments}}, name="open")
    said = str(refused.value)
    assert where in said
    assert "environment variable" in said
    assert "letmein" not in said
    assert KEY not in said


@pytest.mark.parametrize(
    "arguments",
    [
        {"api_key_env": "JUDGE_KEY", "url": "http://host:8000/score"},
        {"end_token": "</s>", "max_tokens": 5, "api_key": ""},
        {"question": "is sk-learn a library?"},
        {"style": "risk-averse-and-calibrated", "task": "task-oriented_dialogue_17"},
    ],
)
def test_what_is_no_secret_is_taken(arguments: dict[str, Any]) -> None:
    load_table({"reward": {"name": "my.py:reward", "arguments": arguments}}, name="plain")


def test_variables_that_arguments_name_are_known_for_processes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "letmein")
    monkeypatch.delenv("NOT_SET", raising=False)
    told = named_variables({"api_key_env": "JUDGE_KEY"}, {"other_env": "NOT_SET", "model": "m"})
    assert told == {"JUDGE_KEY": "letmein"}
    nested = {"judges": [{"api_key_env": "JUDGE_KEY"}], "is_env": True, "keys_env": {"a": "b"}}
    assert named_variables(nested) == told

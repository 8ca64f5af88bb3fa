"""Secrets stay out of run folders and logs: an experiment that holds one is refused.

A run saves what it was given (`resolved.json`, `experiment.toml`, `processes/*.json`), and folders
are copied and shared. So a secret is named by its environment variable, which processes inherit.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

NAMES = re.compile(
    r"(?i)(api_?key|(access|auth|bearer|hf|api)_?token|bearer|pass(word|wd)|secret(_key)?)"
)
"""Of arguments whose value is one."""
VALUES = re.compile(
    r"(?<![A-Za-z0-9])(sk-|hf_|gh[ps]_|github_pat_|xox[bp]-|AKIA)[A-Za-z0-9_-]{16,}"
    r"|://[^/@\s]*:[^/@\s]+@"
)
"""Keys of well-known services, and passwords in addresses."""


def secrets_in(table: Any, path: str) -> Iterator[str]:
    """The dotted paths of what looks like a secret, in a table of arguments."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in items:
        where = f"{path}.{key}"
        if isinstance(value, dict | list | tuple):
            yield from secrets_in(value, where)
        elif isinstance(value, str) and value:
            named = NAMES.fullmatch(str(key)) is not None
            if named or VALUES.search(value):
                yield where


def named_variables(*tables: Any) -> dict[str, str]:
    """The environment variables that arguments name (`api_key_env`), for processes elsewhere."""
    found: dict[str, str] = {}
    for table in tables:
        for key, value in table.items() if isinstance(table, dict) else enumerate(table):
            if isinstance(value, dict | list | tuple):
                found |= named_variables(value)
            elif isinstance(value, str) and str(key).endswith("_env") and value in os.environ:
                found[value] = os.environ[value]
    return found


def check_secrets(experiment: Any) -> Iterator[str]:
    """Yield which values would be written into the run folder and must not be; never the values."""
    environment = experiment.environment
    tables = {
        "reward.arguments": experiment.reward.arguments,
        "environment.arguments": environment.arguments if environment else {},
        "prompts.task_config": experiment.prompts.task_config,
    }
    for path, table in tables.items():
        for where in secrets_in(table, path):
            yield (
                f"{where} looks like a secret, and all that is given is saved in the run folder; "
                "pass the name of an environment variable that holds it, as api_key_env does"
            )

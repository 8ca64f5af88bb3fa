"""The card of an exported model: where its weights come from and what they scored."""

import json
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint


def model_card(run_dir: Path, checkpoint: Checkpoint, *, dtype: str, check: str) -> str:
    """README.md of the exported folder.

    Args:
        run_dir: of the run, whose settings and held-out rewards it tells.
        checkpoint: what was exported.
        dtype: of the exported weights.
        check: how the reload compares with the live policy, in words.
    """
    run_id, version = str(checkpoint.info.get("run_id", "")), checkpoint.version
    run, settings = read_json(run_dir / "run.json"), read_json(run_dir / "resolved.json")
    prompts, reward = settings.get("prompts", {}), settings.get("reward", {})
    task = prompts.get("task") if prompts.get("source") == "reasoning_gym" else prompts.get("path")
    facts = {
        "Run": run_id,
        "Branch and step": f"{version.branch}, {version.step}",
        "Version digest (xxh3-128)": version.digest,
        "Started from": settings.get("model") or Path(checkpoint.info.get("model_dir", "")).name,
        "Task": task or "",
        "Reward": reward.get("name", ""),
        "Seed": run.get("seed", ""),
        "Source commit": run.get("commit") or "",
        "Versions": ", ".join(f"{k} {v}" for k, v in sorted(run.get("versions", {}).items())),
        "Dtype": dtype,
        "Reload check": check,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value != "")
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags:\n- slipstream\n- reinforcement-learning\n---\n\n"
        f"# {run.get('name') or run_id}\n\n"
        "Post-trained by asynchronous reinforcement learning with slipstream.\n\n"
        f"| | |\n|---|---|\n{table}\n{_evaluations(run_dir)}"
    )


def _evaluations(run_dir: Path) -> str:
    """The held-out rewards of the run, as a table; empty when there are none."""
    path = run_dir / "eval.jsonl"
    if not path.is_file():
        return ""
    rows = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            rows[row["step"]] = (
                f"| {row['step']} | {row['reward_mean']:.3f} | {row['ci95_low']:.3f} to "
                f"{row['ci95_high']:.3f} | {row['prompts']} |"
            )
        except (ValueError, KeyError, TypeError):
            continue  # a line cut by a crash
    if not rows:
        return ""
    body = "\n".join(rows[step] for step in sorted(rows))
    return (
        "\n## Held-out reward\n\n| step | mean | 95% interval | prompts |\n|---|---|---|---|\n"
        f"{body}\n"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is missing or unreadable: a card can do without."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

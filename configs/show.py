"""`slipstream show`: reads rollouts to people, and to programs as JSON lines."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from ..buffer.errors import ConfigError
from ..buffer.records import Version
from .rollouts import Pick, Rollout, read_rollouts
from .run_dir import read_run

COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")
"""One per version, by its step; neighbours differ."""

DEFAULT_LIMIT = 5


class Piece(NamedTuple):
    """Consecutive tokens that look alike."""

    text: str
    version: Version | None
    """None: the policy did not write them."""
    masked: bool
    """Without gradient: struck through."""

    @property
    def style(self) -> str:
        """How `rich` draws it."""
        if self.version is None:
            return "dim italic"
        return _colour(self.version) + (" strike" if self.masked else "")


def show(
    run_dir: Path,
    step: int | None = None,
    pick: Pick = "best",
    *,
    jsonl: bool = False,
    limit: int | None = None,
    console: Console | None = None,
) -> int:
    """Print rollouts of one step: prompt, completion coloured by policy version, masked tokens
    struck through, reward and its components, advantage, drop reason.

    Args:
        run_dir: a run folder, of a living run too.
        step: which learner step; None: the newest.
        pick: `best`, `worst`, `stale`, `failed` or `all`.
        jsonl: one JSON object per rollout instead.
        limit: at most so many; None: 5 for people, all as JSON.
        console: where to; standard output when not given.
    Returns:
        How many were shown.
    Raises:
        ConfigError: no run, no such step, or no tokenizer to read tokens with.
    """
    run_dir, console = run_dir.expanduser().absolute(), console or Console()
    tokenizer = load_tokenizer(Path(read_run(run_dir).model_dir))
    limit = limit if limit is not None or jsonl else DEFAULT_LIMIT
    rollouts = read_rollouts(run_dir, step, pick, limit)
    for rollout in rollouts:
        if jsonl:
            line = json.dumps(as_row(rollout, tokenizer), ensure_ascii=False)
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(as_text(rollout, tokenizer), soft_wrap=True)
    if not rollouts and not jsonl:
        console.print(f"no rollout to show with --pick {pick}")
    return len(rollouts)


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """The model's tokenizer, without transformers.

    Raises:
        ConfigError: the folder has no `tokenizer.json`.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing, so token ids cannot be read as text")
    return Tokenizer.from_file(str(path))


def as_text(rollout: Rollout, tokenizer: Tokenizer) -> Text:
    """One rollout for people."""
    entry, trajectory = rollout.entry, rollout.trajectory
    text = Text()
    text.append(
        f"step {entry.step}  prompt {trajectory.uid} ({rollout.prompt.source_id})  attempt "
        f"{trajectory.attempt}  sample {trajectory.index}  {trajectory.engine_id}\n",
        style="bold",
    )
    text.append(_scored(rollout), style=_mood(rollout)).append(f"  {_fate(rollout)}\n")
    for message in rollout.prompt.messages:
        text.append(f"{message.role}: {message.content}\n", style="dim")
    for piece in pieces(rollout, tokenizer):
        text.append(piece.text, style=piece.style)
    text.append("\n")
    for version in dict.fromkeys(span.version for span in trajectory.versions):
        text.append(f"  version {version}", style=_colour(version))
    if rollout.num_masked:
        text.append("  struck through: no gradient", style="strike dim")
    return text.append("\n")


def _scored(rollout: Rollout) -> str:
    score = rollout.trajectory.score
    if score.value is None:
        return f"{score.status}: {score.reason}"
    parts = "".join(f"  {name} {value:.4g}" for name, value in score.components.items())
    advantage = "" if rollout.advantage is None else f"  advantage {rollout.advantage:+.3f}"
    return f"reward {score.value:.4g}{parts}{advantage}"


def _fate(rollout: Rollout) -> str:
    """What became of it."""
    entry, trajectory = rollout.entry, rollout.trajectory
    length = f"({trajectory.num_policy_tokens} tokens, {trajectory.finish_reason})"
    if entry.decision is None:
        return f"dropped: {entry.drop_reason} {length}"
    if not entry.decision.trained:
        return f"in the baseline only: {entry.drop_reason or 'no weight'} {length}"
    trimmed = entry.decision.stale_prefix
    return f"trained{f', first {trimmed} tokens stale' if trimmed else ''} {length}"


def _mood(rollout: Rollout) -> str:
    if rollout.trajectory.score.value is None:
        return "red"
    return "green" if (rollout.advantage or 0) > 0 else "yellow"


def _colour(version: Version) -> str:
    return COLOURS[version.step % len(COLOURS)]


def pieces(rollout: Rollout, tokenizer: Tokenizer) -> list[Piece]:
    """What follows the first prompt, in stretches of one version and one fate.

    Texts are cut from one decoding of everything, so that spaces between tokens are kept.
    """
    trajectory = rollout.trajectory
    start = int(trajectory.policy_mask.argmax()) if trajectory.num_policy_tokens else 0
    ids = [int(token) for token in trajectory.token_ids[start:]]
    found, shown, end = [], "", 0
    for label, stretch in groupby(_labels(rollout)[start:]):
        end += len(list(stretch))
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if end < len(ids):
            whole = whole.rstrip("\ufffd")  # half a character; its other half comes next
        found.append(Piece(whole[len(shown) :], *label))
        shown = whole
    return found


def _labels(rollout: Rollout) -> list[tuple[Version | None, bool]]:
    """(version, masked) of each token of the trajectory."""
    trajectory, masked = rollout.trajectory, rollout.num_masked
    written = [span.version for span in trajectory.versions for _ in range(span.length)]
    policy = ((version, i < masked) for i, version in enumerate(written))
    return [next(policy) if is_policy else (None, True) for is_policy in trajectory.policy_mask]


def as_row(rollout: Rollout, tokenizer: Tokenizer) -> dict[str, Any]:
    """One rollout for programs."""
    entry, trajectory = rollout.entry, rollout.trajectory
    return {
        "step": entry.step,
        "uid": trajectory.uid,
        "attempt": trajectory.attempt,
        "index": trajectory.index,
        "source_id": rollout.prompt.source_id,
        "prompt": [{"role": m.role, "content": m.content} for m in rollout.prompt.messages],
        "text": trajectory.text,
        "reward": trajectory.score.value,
        "components": trajectory.score.components,
        "status": trajectory.score.status,
        "reason": trajectory.score.reason,
        "advantage": rollout.advantage,
        "trained": entry.decision is not None and entry.decision.trained,
        "drop_reason": entry.drop_reason,
        "stale_prefix": entry.decision.stale_prefix if entry.decision else 0,
        "tokens": trajectory.num_policy_tokens,
        "finish_reason": trajectory.finish_reason,
        "engine": trajectory.engine_id,
        "pieces": [
            {**piece._asdict(), "version": piece.version and str(piece.version)}
            for piece in pieces(rollout, tokenizer)
        ],
    }

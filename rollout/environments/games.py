"""Built-in games: Countdown and Sudoku with feedback, and a text world to walk through."""

import ast
import operator
import re
from collections import Counter
from typing import Any

import numpy as np

from ...buffer.records import Prompt
from .base import Step

_LAST_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}  # fmt: skip
MAX_EXPRESSION_CHARS = 500


def answer_in(text: str) -> str:
    """What stands in the last `<answer>...</answer>`, else the last line."""
    found = _LAST_ANSWER.findall(text)
    return found[-1] if found else (text.strip().splitlines() or [""])[-1].strip()


def evaluate(expression: str) -> tuple[float, list[int]]:
    """The value of + - * / over integers, and the integers used.

    Raises:
        ValueError: it is not such an expression, or divides by zero.
    """
    numbers: list[int] = []

    def value(node: ast.AST) -> float:
        match node:
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.Constant(value=int(number)) if type(number) is int:
                numbers.append(number)
                return float(number)
        raise ValueError("only integers, + - * / and brackets are allowed")

    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"longer than {MAX_EXPRESSION_CHARS} characters")
    try:
        return value(ast.parse(expression.strip(), mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(str(error).partition(" (")[0]) from None


class Countdown:
    """Reach the target with each number at most once; says what a wrong expression gives.

    For prompts of reasoning-gym's `countdown`. Reward 1 for the target, 0 at every other turn.
    """

    async def reset(self, prompt: Prompt) -> Step:
        """The prompt asks already."""
        self._numbers = Counter(prompt.payload["metadata"]["numbers"])
        self._target = prompt.payload["metadata"]["target"]
        self._tried: list[str] = []
        return Step(state=[])

    async def step(self, action: str) -> Step:
        """Judge one expression."""
        expression = answer_in(action).partition("=")[0].strip()
        self._tried.append(expression)
        try:
            value, used = evaluate(expression)
        except ValueError as error:
            return self._wrong(f"{expression[:80]!r} cannot be computed: {error}.")
        if Counter(used) - self._numbers:
            return self._wrong("Use each given number at most once.")
        if abs(value - self._target) < 1e-9:
            return Step(reward=1.0, done=True, state=self._tried)
        return self._wrong(f"{expression} = {value:g}, not {self._target}.")

    def _wrong(self, why: str) -> Step:
        return Step(observation=f"{why} Try again.", reward=0.0, state=self._tried[-1:])


class Sudoku:
    """Fill the grid a cell at a time: `row column digit`, each from 1.

    For prompts of reasoning-gym's `sudoku` or `mini_sudoku`. A right cell earns its share of 1; a
    wrong one earns nothing, is refused and ends the episode after `mistakes` of them.
    """

    def __init__(self, *, mistakes: int = 3) -> None:
        """Allow so many wrong cells."""
        self._allowed = mistakes

    async def reset(self, prompt: Prompt) -> Step:
        """Says how to answer."""
        meta = prompt.payload["metadata"]
        self._grid = [list(row) for row in meta["puzzle"]]
        self._solution = meta["solution"]
        self._share = 1.0 / max(1, sum(row.count(0) for row in self._grid))
        text = "Instead of the whole grid write one cell at a time: `row column digit`."
        return Step(observation=text, state=self._grid)

    async def step(self, action: str) -> Step:
        """Judge one cell."""
        found = re.findall(r"(\d)\D+(\d)\D+(\d)", answer_in(action))
        size = len(self._grid)
        if not found or not all(1 <= int(part) <= size for part in found[-1]):
            return self._refused("Write `row column digit`.")
        row, column, digit = (int(part) for part in found[-1])
        if self._grid[row - 1][column - 1]:
            return self._refused(f"Row {row} column {column} is filled already.")
        if self._solution[row - 1][column - 1] != digit:
            return self._refused(f"{digit} at row {row} column {column} is wrong.")
        self._grid[row - 1][column - 1] = digit
        done = all(all(row) for row in self._grid)
        text = "\n".join(" ".join(str(c or "_") for c in row) for row in self._grid)
        return Step(observation=text, reward=self._share, done=done, state=self._grid)

    def _refused(self, why: str) -> Step:
        self._allowed -= 1
        return Step(observation=why, reward=0.0, done=self._allowed <= 0, state=self._grid)


_MOVES = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


def gem_world(seed: int, size: int = 5) -> dict[str, Any]:
    """A prompt of `GemHunt` (`prompts.source = "function"`): where you are and where the gem is."""
    start, gem = np.random.default_rng(seed).choice(size * size, 2, replace=False).tolist()
    here, there = divmod(start, size), divmod(gem, size)
    return {"prompt": _places(here, there), "here": here, "gem": there, "size": size}


def _places(here: tuple[int, int], gem: tuple[int, int]) -> str:
    ways = " ".join(towards(here, gem)) or "here"
    return f"you {here[0]} {here[1]} gem {gem[0]} {gem[1]} {ways}"


def towards(here: tuple[int, int], gem: tuple[int, int]) -> list[str]:
    """The words that lead nearer to the gem."""
    offset = (gem[0] - here[0], gem[1] - here[1])
    return [word for word, (x, y) in _MOVES.items() if x * offset[0] + y * offset[1] > 0]


class GemHunt:
    """A text world on a grid: one word a turn (north, south, east, west) until the gem is found."""

    async def reset(self, prompt: Prompt) -> Step:
        """The prompt says where you are."""
        data = prompt.payload
        self._here, self._gem, self._size = tuple(data["here"]), tuple(data["gem"]), data["size"]
        return Step(state=self._here)

    async def step(self, action: str) -> Step:
        """Walk one place; a wall or another word leaves you where you are."""
        words = action.split()
        dx, dy = _MOVES.get(words[-1].lower() if words else "", (0, 0))
        x, y = self._here[0] + dx, self._here[1] + dy
        if 0 <= x < self._size and 0 <= y < self._size:
            self._here = (x, y)
        found = self._here == self._gem
        return Step(
            observation=_places(self._here, self._gem),
            reward=float(found),
            done=found,
            state=self._here,
        )


TOWARDS = 0.3
"""Share of a demonstration's steps that are chosen to go towards the gem; the others wander."""


def gem_demonstration(prompt: Prompt) -> list[dict[str, str]]:
    """A walk of at most four turns, for a warm start that knows how to walk and hardly where to."""
    data = prompt.payload
    here, gem, size = tuple(data["here"]), tuple(data["gem"]), data["size"]
    random = np.random.default_rng(prompt.seed + 1)
    messages: list[dict[str, str]] = []
    for _ in range(4):
        ways = towards(here, gem) if random.random() < TOWARDS else list(_MOVES)
        word = str(random.choice(ways))
        messages.append({"role": "assistant", "content": word})
        x, y = here[0] + _MOVES[word][0], here[1] + _MOVES[word][1]
        here = (x, y) if 0 <= x < size and 0 <= y < size else here
        if here == gem:
            break
        messages.append({"role": "user", "content": _places(here, gem)})
    return messages if messages[-1]["role"] == "assistant" else messages[:-1]

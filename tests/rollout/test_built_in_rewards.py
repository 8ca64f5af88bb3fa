"""Built-in rewards: schemas, generated code and its escapes, judges, sums, classifiers."""

import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.records import Completion, Message, Prompt
from slipstream.rollout.config import PromptsConfig, RewardConfig
from slipstream.rollout.prompts import PromptSource
from slipstream.rollout.rewards.base import load_reward
from slipstream.rollout.rewards.pool import RewardPool
from slipstream.rollout.rewards.sandbox import run_python
from slipstream.rollout.rewards.shaping import mismatch

SERVER = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

failures = {}

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/chat/completions"):
            text = body["messages"][-1]["content"]
            key = self.headers.get("authorization", "")
        else:
            text, key = body["completion"]["text"], ""
        if "flaky" in text and failures.setdefault(text, 0) < 2:
            failures[text] += 1
            return self.reply(503, {})
        if "down" in text:
            return self.reply(500, {"error": "down"})
        if "refuse" in text:
            return self.reply(400, {"error": "no"})
        time.sleep(0.2 if "slow" in text else 0)
        if key or "/chat" in self.path:
            said = "no idea" if "mute" in text else f"Fine. Score: {7 if key == 'Bearer k' else 2}"
            return self.reply(200, {"choices": [{"message": {"content": said}}]})
        self.reply(200, {"score": len(text)})
    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *arguments):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def address():
    """A real HTTP server in a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()
        process.wait()


def prompt(**payload) -> Prompt:
    messages = (Message(role="user", content="why?"),)
    return Prompt(uid=1, source_id="t/1", task="t", messages=messages, payload=payload)


def load(name, **arguments):
    return load_reward(RewardConfig(name=name, arguments=arguments))


@pytest.mark.parametrize(
    "code",
    [
        "open(PATH, 'w').write('x')",
        "import os; os.open(PATH, os.O_WRONLY | os.O_CREAT)",
        "import os; os.mkdir(PATH)",
        "import os; os.symlink('/etc', PATH)",
        "import os; os.unlink(VICTIM)",
        "import os; os.truncate(VICTIM, 0)",
        "import os; os.chmod(VICTIM, 0)",
        "import os; os.rename(VICTIM, PATH)",
        "import socket; socket.create_connection(('127.0.0.1', PORT))",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.fork()",
        "import os\nwhile True:\n    os.fork()",
        "import subprocess; subprocess.run(['true'], check=True)",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/sh', ['sh', '-c', 'echo x > ' + PATH])",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import ctypes; assert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0",
        "import ctypes; assert ctypes.CDLL(None).syscall(57) > 0",
        "import os; assert os.environ.get('HOME')",
    ],
)
def test_an_escape_from_the_sandbox_is_refused(code, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    names = f"PATH, VICTIM, PORT = {str(tmp_path / 'made')!r}, {str(victim)!r}, 9\n"
    ran = run_python(names + code, timeout_s=3)
    assert not ran.ok
    assert os.listdir(tmp_path) == ["victim"]
    assert victim.read_text() == "kept"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("while True: pass", "took longer than 1 s"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("while True: print('x' * 10**6)", ""),
        ("import ctypes; ctypes.string_at(0)", "died from SIGSEGV"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ""),
        ("x = 1\0", "cannot be started"),
    ],
)
def test_a_program_that_misbehaves_is_contained_and_named(code, why):
    began = time.monotonic()
    ran = run_python(code, timeout_s=1)
    assert not ran.ok
    assert why in ran.error
    assert len(ran.stdout) <= 1 << 16
    assert time.monotonic() - began < 20


def test_what_programs_need_works_in_the_sandbox():
    code = "import json, math, threading\nt = threading.Thread(target=print, args=(input(),))"
    assert run_python(f"{code}\nt.start(); t.join()", "hello").stdout == "hello\n"


def test_code_that_cheats_passes_no_test():
    reward = load("code_tests", all_or_nothing=False)
    tests = [{"call": "f(2)", "equals": 4}, {"call": "f(3)", "equals": 9}]
    half = reward(Completion(text="def f(x): return 4"), prompt(tests=tests))
    assert (half.value, half.components) == (0.5, {"tests_passed": 0.5})
    for cheat in (
        "class E:\n  def __eq__(self, o): return True\n  def __repr__(self): return '4'\n"
        "def f(x):\n  return E()\nimport builtins\nbuiltins.repr = lambda x: 'object()'",
        "import sys\nsys.exit(0)",
        "import atexit, os\ndef f(x): os._exit(0)",
        "print('9'); print('4')\ndef f(x): return None",
    ):
        assert reward(Completion(text=cheat), prompt(tests=tests)).value == 0.0, cheat
    assert "payload has no tests" in reward(Completion(text=""), prompt()).reason


def test_a_schema_is_checked_and_one_with_unknown_conditions_refused():
    nested = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [{"type": "string"}, {"const": 3}]},
    }
    assert mismatch(["a", 3], nested) == ""
    assert mismatch(["a", 4], nested) == "$[1] fits none of anyOf"
    assert mismatch([], nested) == "$'s length is below 1"
    assert mismatch(True, {"type": "integer"}) == "$ is not a integer"
    assert mismatch("ab", {"pattern": "^b"}) == "$ does not match '^b'"
    with pytest.raises(ConfigError, match="uniqueItems is not supported"):
        load("json_schema", schema={"uniqueItems": True})
    deep = load("json_schema", schema={"type": "object"})(Completion(text="[" * 10**5), prompt())
    assert deep.value == 0.0


def test_length_falls_between_target_and_limit_and_cut_answers_get_nothing():
    reward = load("length", target=10, limit=20)
    scores = [reward(Completion(text="", token_ids=(1,) * n), prompt()).value for n in (10, 15, 20)]
    assert scores == [1.0, 0.5, 0.0]
    cut = Completion(text="", token_ids=(1,), finish_reason="length")
    assert reward(cut, prompt()).value == 0.0


def test_a_sum_logs_each_part_and_hands_arguments_down():
    parts = ["exact_match", {"name": "length", "arguments": {"target": 1, "limit": 3}}]
    reward = load("sum", rewards=parts, weights=[1.0, 0.5])
    score = reward(Completion(text="a", token_ids=(1, 2)), prompt(answer="a"))
    assert (score.value, score.components) == (1.25, {"exact_match": 1.0, "length": 0.5})
    with pytest.raises(ConfigError, match="Extra inputs"):
        load("sum", rewards=[{"name": "length", "argument": {}}])


async def test_judges_and_endpoints_are_asked_side_by_side_and_tried_again(address, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    arguments = {"base_url": f"{address}/v1", "model": "m", "api_key_env": "JUDGE_KEY"}
    config = RewardConfig(name="judge", arguments=arguments, timeout_s=20)
    async with RewardPool(config) as pool:
        texts = ["good", "flaky", "down", "refuse", "mute", *[f"slow {i}" for i in range(20)]]
        began = time.monotonic()
        scores = await asyncio.gather(
            *(pool.score(Completion(text=text), prompt(answer="x")) for text in texts)
        )
        assert time.monotonic() - began < 20 * 0.2 + 5
    by_text = dict(zip(texts, scores, strict=True))
    assert by_text["good"].value == by_text["flaky"].value == 0.7
    assert by_text["down"].status == "infrastructure_failed"
    assert "answered 500" in by_text["down"].reason
    assert by_text["refuse"].status == by_text["mute"].status == "reward_failed"
    assert {by_text[f"slow {i}"].value for i in range(20)} == {0.7}


def test_an_http_reward_takes_a_number_and_says_who_cannot_be_reached(address):
    reward = load("http", url=address)
    assert reward(Completion(text="four"), prompt()).value == 4.0
    gone = load("http", url="http://127.0.0.1:9")(Completion(text=""), prompt())
    assert (gone.status, "cannot be reached" in gone.reason) == ("infrastructure_failed", True)
    for arguments in ({"url": "file:///etc/passwd"}, {"url": address, "api_key_env": "NOT_SET"}):
        with pytest.raises(ConfigError, match=r"not an http address|is not set"):
            load("http", **arguments)


def test_a_classifier_scores_a_batch_like_each_alone(tmp_path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 64, "num_labels": 1,
    }  # fmt: skip
    config = BertConfig(**sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    words = {"<pad>": 0, "<unk>": 1, **{c: i + 2 for i, c in enumerate("abcdefghijk why?\n")}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained(tmp_path)
    reward = load("classifier", model=str(tmp_path))
    samples = [(Completion(text=text), prompt()) for text in ("abc", "defghi", "k")]
    together = [score.value for score in reward.many(samples)]
    alone = [reward(*sample).value for sample in samples]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 3
    with pytest.raises(ConfigError, match="is not a folder"):
        load("classifier", model="nowhere")


GOLD_ELSEWHERE = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
"""Tasks with many right answers, which name one in their metadata."""
NO_GOLD = {
    "boxnet": "any plan that brings the boxes to their targets; the task names none",
    "rush_hour": "any moves that free the car; the task names none",
}
"""Tasks that have no gold answer, and why."""
SCORE_ALL = """
import json, sys
from reasoning_gym.factory import DATASETS
from slipstream.buffer.records import Completion
from slipstream.rollout.config import PromptsConfig, RewardConfig
from slipstream.rollout.prompts import PromptSource
from slipstream.rollout.rewards.base import load_reward

reward, elsewhere = load_reward(RewardConfig(name="reasoning_gym")), json.loads(sys.argv[1])
for task in sorted(DATASETS):
    extra = {"datasets": [{"name": "chain_sum"}, {"name": "leg_counting"}]}
    config = extra if task == "composite" else {}
    source = PromptSource(PromptsConfig(task=task, size=5, held_out=0, task_config=config), 0)
    for uid in range(2):
        made = source.prompt(uid)
        gold = made.payload["answer"]
        if task in elsewhere:
            gold = made.payload["metadata"][elsewhere[task]]
            gold = gold if isinstance(gold, str) else json.dumps(gold)
        score = gold and reward(Completion(text=f"<answer>{gold}</answer>"), made)
        print()  # some tasks print dots
        print(json.dumps([task, score and [score.value, score.reason]]))
"""


def test_gold_answers_of_all_reasoning_gym_tasks_score_1_but_where_there_is_none():
    """In a process of its own: five tasks ask what Python's string hashing makes of them."""
    done = subprocess.run(
        [sys.executable, "-c", SCORE_ALL, json.dumps(GOLD_ELSEWHERE)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True, text=True, timeout=250, check=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len({task for task, _ in lines}) >= 106
    assert {task for task, score in lines if score is None} == set(NO_GOLD)
    assert [line for line in lines if line[1] not in (None, [1.0, ""])] == []


def test_a_function_is_a_source_of_prompts_with_held_out_ones_apart(tmp_path):
    (tmp_path / "make.py").write_text(
        "def row(seed, top=50): return {'prompt': str(seed % top), 'answer': seed % top}"
    )
    config = PromptsConfig(source="function", task=f"{tmp_path}/make.py:row", held_out=10, size=100)
    source = PromptSource(config, 3)
    held_out = {p.messages[0].content for p in source.held_out()}
    asked = {source.prompt(uid).messages[0].content for uid in range(100)}
    assert len(held_out) == 10
    assert not held_out & asked
    assert json.dumps(source.prompt(7).payload) == json.dumps(
        PromptSource(config, 3).prompt(7).payload
    )
    with pytest.raises(ConfigError, match="gave only 50 distinct"):
        PromptSource(config.model_copy(update={"held_out": 60}), 3)

"""Whatever a reward does, its sample is answered in time and no other sample suffers."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from slipstream.buffer.errors import ConfigError, PeerLost, TrainingFailed
from slipstream.buffer.records import Completion, Message, Prompt
from slipstream.rollout.config import RewardConfig
from slipstream.rollout.rewards import pool as pool_module
from slipstream.rollout.rewards.pool import RewardPool

PROMPT = Prompt(
    uid=1,
    source_id="t/1",
    task="t",
    messages=(Message(role="user", content="?"),),
    payload={"answer": "a"},
)

# What the completion asks for is what the reward does.
MISBEHAVING = """
import ctypes, os, subprocess, sys, time
from pathlib import Path
from slipstream.buffer.records import Score

def reward(completion, prompt):
    match completion.text.split():
        case ["print"]:
            print("noise" * 10, flush=True)
            os.write(1, b"raw noise")
            print(input() if False else sys.stdin.read(), file=sys.stderr)
        case ["exit", code]:
            os._exit(int(code))
        case ["segfault"]:
            ctypes.string_at(0)
        case ["hang"]:
            time.sleep(1000)
        case ["spin"]:
            (10**8) ** (10**8)  # holds the interpreter's lock
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["child", file]:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            Path(file).write_text(str(child.pid))
            time.sleep(1000)
        case ["flood"]:
            return Score(value=1.0, components={str(i): 0.0 for i in range(200_000)})
        case ["forge"]:
            for fd in range(3, 20):
                try:
                    os.write(fd, b"\\xff" * 64)
                except OSError:
                    pass
            time.sleep(1000)
        case ["fail"]:
            raise ValueError("no")
    return 0.5
"""


def config(tmp_path, timeout_s=1.0, **changes) -> RewardConfig:
    file = tmp_path / "misbehaving.py"
    file.write_text(MISBEHAVING)
    return RewardConfig(**{"name": f"{file}:reward", "timeout_s": timeout_s, **changes})


async def scores(pool, *texts):
    return await asyncio.gather(*(pool.score(Completion(text=text), PROMPT) for text in texts))


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def until_dead(pid: int, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        await asyncio.sleep(0.02)


async def test_failing_samples_are_answered_with_reasons_and_the_others_are_scored(tmp_path):
    texts = (
        "ok",
        "exit 3",
        "print",
        "segfault",
        "flood",
        "ok",
        "fail",
        "forge",
        "ok",
        "hang",
        "ok",
    )
    async with RewardPool(config(tmp_path)) as pool:
        answers = dict(zip(range(20), await scores(pool, *texts), strict=False))
        reasons = {texts[i]: a.reason for i, a in answers.items() if a.status == "reward_failed"}
        assert [a.value for i, a in answers.items() if texts[i] in ("ok", "print")] == [0.5] * 5
        assert reasons.pop("exit 3") == "the reward process ended with exit code 3"
        assert reasons.pop("segfault") == "the reward process died from SIGSEGV"
        assert reasons.pop("flood") == "the reward's score takes more than 1048576 bytes"
        assert "ValueError: no" in reasons.pop("fail")
        assert "wrote something that is not a reply" in reasons.pop("forge")
        assert reasons.pop("hang") == (
            "the reward took longer than reward.timeout_s = 1 s and was killed"
        )
        assert not reasons
        assert pool.restarts == 4


async def test_each_sample_has_its_own_clock_however_many_wait_before_it(tmp_path):
    async with RewardPool(config(tmp_path, timeout_s=1.0)) as pool:
        started = time.monotonic()
        answers = await scores(pool, *["sleep 0.3"] * 6)
        assert time.monotonic() - started > 1.5
        assert [answer.value for answer in answers] == [0.5] * 6
        assert pool.restarts == 0


async def test_a_reward_that_holds_the_interpreter_is_killed_in_time(tmp_path):
    async with RewardPool(config(tmp_path, timeout_s=0.5), num_processes=2) as pool:
        started = time.monotonic()
        answers = await scores(pool, "spin", "ok", "ok", "ok")
        assert [answer.value for answer in answers] == [None, 0.5, 0.5, 0.5]
        assert time.monotonic() - started < 10


async def test_a_busy_event_loop_does_not_cost_a_reward_its_time(tmp_path):
    async with RewardPool(config(tmp_path, timeout_s=0.5)) as pool:
        waiting = asyncio.create_task(pool.score(Completion(text="sleep 0.1"), PROMPT))
        await asyncio.sleep(0)
        time.sleep(0.8)
        assert (await waiting).value == 0.5


async def test_killing_a_reward_takes_the_processes_it_started(tmp_path):
    file = tmp_path / "pid"
    async with RewardPool(config(tmp_path, timeout_s=1.5)) as pool:
        (answer,) = await scores(pool, f"child {file}")
        assert answer.status == "reward_failed"
        await until_dead(int(file.read_text()))


async def test_a_reward_that_cannot_be_loaded_is_a_config_error_with_its_message(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import nothing_of_the_kind")
    with pytest.raises(ConfigError, match=r"cannot be imported: ModuleNotFoundError"):
        async with RewardPool(RewardConfig(name=f"{bad}:reward")):
            pass
    bad.write_text("import os; os._exit(7)")
    pool = RewardPool(RewardConfig(name=f"{bad}:reward"), num_processes=2)
    with pytest.raises(ConfigError, match=r"ended with exit code 7 while it was loading"):
        await pool.score(Completion(text=""), PROMPT)
    await pool.close()


KILLED_WHILE_LOADING = """
import os, signal
from pathlib import Path

starts = Path(__file__).with_suffix(".starts")
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if len(starts.read_text()) < LOADS:
    os.kill(os.getpid(), signal.SIGKILL)

def reward(completion, prompt):
    return 1.0
"""


@pytest.mark.parametrize(("loads", "starts"), [(3, 3), (99, 3)])
async def test_a_reward_process_killed_while_it_loads_is_started_again_and_not_for_ever(
    tmp_path, loads, starts
):
    file = tmp_path / "mine.py"
    file.write_text(KILLED_WHILE_LOADING.replace("LOADS", str(loads)))
    pool = RewardPool(RewardConfig(name=f"{file}:reward"))
    try:
        if loads == starts:
            await pool.start()
        else:
            with pytest.raises(ConfigError, match="while it was loading"):
                await pool.start()
    finally:
        await pool.close()
    assert len(file.with_suffix(".starts").read_text()) == starts


async def test_a_reward_that_never_loads_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("slipstream.rollout.rewards.child.START_TIMEOUT_S", 1.5)
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(1000)")
    with pytest.raises(ConfigError, match=r"did not load within 1\.5 s and was killed"):
        await RewardPool(RewardConfig(name=f"{slow}:reward")).start()


async def test_rewards_failing_too_often_end_the_run_with_the_last_reason(tmp_path):
    async with RewardPool(config(tmp_path, max_failure_rate=0.5)) as pool:
        await scores(pool, *["fail"] * (pool_module.MIN_REWARDS_JUDGED - 1))
        pool.raise_if_failing()  # too few to judge
        await scores(pool, *["ok"] * pool_module.MIN_REWARDS_JUDGED)
        pool.raise_if_failing()
        await scores(pool, "fail", "fail")
        with pytest.raises(
            TrainingFailed, match=r"21 of the last 41 .*\(.* = 0.5\).*ValueError: no"
        ):
            pool.raise_if_failing()


async def test_closing_answers_what_waits_and_leaves_no_process(tmp_path):
    pool = RewardPool(config(tmp_path, timeout_s=60), num_processes=2)
    await pool.start()
    children = psutil.Process().children()
    waiting = [asyncio.create_task(scores(pool, "hang")) for _ in range(10)]
    await asyncio.sleep(0.1)
    await pool.close()
    answers = [answer for task in waiting for answer in await task]
    assert {(a.status, a.value) for a in answers} == {("infrastructure_failed", None)}
    assert not any(alive(child.pid) for child in children)
    assert (await scores(pool, "ok"))[0].status == "infrastructure_failed"


async def test_a_child_dies_with_a_worker_that_is_killed(tmp_path):
    settings = config(tmp_path, timeout_s=60).model_dump_json()
    worker = (
        "import asyncio, psutil\n"
        "from slipstream.buffer.records import Completion, Prompt\n"
        "from slipstream.rollout.config import RewardConfig\n"
        "from slipstream.rollout.rewards.pool import RewardPool\n"
        "async def main():\n"
        f"    pool = RewardPool(RewardConfig.model_validate_json({settings!r}))\n"
        "    await pool.start()\n"
        "    prompt = Prompt(uid=1, source_id='t', task='t', messages=())\n"
        "    asyncio.create_task(pool.score(Completion(text='spin'), prompt))\n"
        "    await asyncio.sleep(0.2)\n"
        "    print(psutil.Process().children()[0].pid, flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        child = int(await asyncio.to_thread(process.stdout.readline))
        assert alive(child)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    await until_dead(child)


async def test_file_rewards_import_their_neighbours(tmp_path):
    Path(tmp_path / "neighbour.py").write_text("VALUE = 0.25")
    (tmp_path / "mine.py").write_text(
        "from neighbour import VALUE\ndef reward(completions, **columns): return [VALUE]"
    )
    async with RewardPool(RewardConfig(name=f"{tmp_path}/mine.py:reward")) as pool:
        assert (await scores(pool, "ok"))[0].value == 0.25


async def test_when_no_process_can_be_had_what_waits_fails_and_does_not_hang(tmp_path, monkeypatch):
    async with RewardPool(config(tmp_path)) as pool:

        async def refuse(*_):
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

        monkeypatch.setattr(pool_module.RewardChild, "start", refuse)
        async with asyncio.timeout(20):
            first, *behind = await scores(pool, "exit 3", *["ok"] * 6)
        assert first.status == "reward_failed"
        assert {score.status for score in behind} == {"infrastructure_failed"}
        assert "Resource temporarily unavailable" in behind[-1].reason
        with pytest.raises(PeerLost, match="cannot be restarted"):  # the worker ends with it
            await scores(pool, "ok")


BATCHED = """
import asyncio, ctypes, os, time

calls = []

def batch(prompts, completions, **columns):
    calls.append(len(completions))
    if "die" in completions:
        os._exit(3)
    return [float(len(calls)) if text == "calls" else 1.0 for text in completions]
batch.batch_size = 8

async def side_by_side(completion, prompt):
    if completion.text == "die":
        ctypes.string_at(0)
    await asyncio.sleep(1000 if completion.text == "hang" else 0.2)
    return 1.0
side_by_side.batch_size = 16

count = 0
def counted(completion, prompt):
    global count
    count += 1
    if completion.text == "fail":
        raise ValueError("no")
    return float(count)
counted.cacheable = True

def nonsense(completion, prompt):
    return 1.0
nonsense.batch_size = 0
"""


def batched(tmp_path, name, **changes) -> RewardConfig:
    file = tmp_path / "batched.py"
    file.write_text(BATCHED)
    return RewardConfig(name=f"{file}:{name}", **changes)


async def test_a_list_function_is_given_lists_and_only_the_culprit_of_a_crash_fails(tmp_path):
    async with RewardPool(batched(tmp_path, "batch")) as pool:
        assert [s.value for s in await scores(pool, *["x"] * 40)] == [1.0] * 40
        (last,) = await scores(pool, "calls")
        assert last.value < 20
        answers = await scores(pool, *["x"] * 5, "die", *["x"] * 5)
        assert [a.status for a in answers] == ["scored"] * 5 + ["reward_failed"] + ["scored"] * 5
        assert answers[5].reason == "the reward process ended with exit code 3"


async def test_async_calls_run_side_by_side_and_a_slow_one_fails_alone(tmp_path):
    async with RewardPool(batched(tmp_path, "side_by_side", timeout_s=3.0)) as pool:
        started = time.monotonic()
        answers = await scores(pool, *["x"] * 15, "hang")
        assert [a.status for a in answers] == ["scored"] * 15 + ["reward_failed"]
        assert "TimeoutError" in answers[-1].reason
        assert time.monotonic() - started < 15 * 0.2 + 3.0
        assert pool.restarts == 0
        answers = await scores(pool, *["x"] * 7, "die")
        assert [a.status for a in answers] == ["scored"] * 7 + ["reward_failed"]


async def test_equal_samples_of_a_cacheable_reward_are_scored_once_and_failures_never_kept(
    tmp_path,
):
    async with RewardPool(batched(tmp_path, "counted")) as pool:
        first = [(await scores(pool, text))[0].value for text in ("a", "b", "a", "b")]
        assert (first, pool.cached) == ([1.0, 2.0, 1.0, 2.0], 2)
        other = Prompt(uid=2, source_id="t/2", task="t", messages=(), payload={"answer": "z"})
        assert (await pool.score(Completion(text="a"), other)).value == 3.0
        assert {(await scores(pool, "fail"))[0].status for _ in range(2)} == {"reward_failed"}
        assert pool.cached == 2


async def test_a_nonsensical_declaration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size = 0 must be from 1"):
        await RewardPool(batched(tmp_path, "nonsense")).start()


NASTY = """
import ctypes, os, sys, time

class Unpicklable(Exception):
    def __init__(self, a, b):
        self.lock = __import__("threading").Lock()
    def __str__(self):
        raise RuntimeError("no message either")
    def __reduce__(self):
        raise TypeError("cannot be pickled")

def reward(completion, prompt):
    match completion.text.split()[0]:
        case "loop":
            while True: pass
        case "allocate":
            return len([bytearray(10**8) for _ in range(10**4)])
        case "fork":
            for _ in range(5):
                if os.fork() == 0:
                    os.setsid()
                    while True: time.sleep(0.01)
            while True: pass
        case "exit": os._exit(0)
        case "segfault": ctypes.string_at(0)
        case "print":
            while True: os.write(1, b"x" * 10**6)
        case "unpicklable": raise Unpicklable(1, 2)
    return 1.0
"""
KINDS = ("loop", "allocate", "fork", "exit", "segfault", "print", "unpicklable")


async def survive_nasty_rewards(tmp_path, each: int) -> None:
    """So many of each kind between good ones; afterwards nothing of them is left."""
    file = tmp_path / "nasty.py"
    file.write_text(NASTY)
    config = RewardConfig(name=f"{file}:reward", timeout_s=0.5, memory_mb=1024, processes=2)
    mine = psutil.Process()
    before = set(psutil.pids())
    memory = mine.memory_info().rss
    async with RewardPool(config) as pool:
        texts = [f"{kind} {n}" for n in range(each) for kind in (*KINDS, "good")]
        answers = dict(zip(texts, await scores(pool, *texts), strict=True))
    for text, answer in answers.items():
        good = text.startswith("good")
        assert answer.status == ("scored" if good else "reward_failed"), (text, answer)
        assert good or answer.reason
    left = [
        p for p in psutil.process_iter(["cmdline"])
        if p.pid not in before and "slipstream.rollout.rewards.process" in (p.info["cmdline"] or [])
        and p.status() != psutil.STATUS_ZOMBIE
    ]  # fmt: skip
    assert [p for p in left if p.ppid() in (1, mine.pid)] == []
    assert mine.memory_info().rss - memory < 200 << 20


async def test_nasty_rewards_fail_their_samples_and_nothing_else(tmp_path, capfd):
    await survive_nasty_rewards(tmp_path, 5)
    assert len(capfd.readouterr().err) < 40 << 20  # gigabytes were printed


@pytest.mark.slow
async def test_two_hundred_of_each_nasty_reward_leave_nothing_behind(tmp_path):
    await survive_nasty_rewards(tmp_path, 200)

"""The command line answers at once: no tensor library is imported to plan or to supervise."""

import json
import resource
import subprocess
import sys

import pytest

HEAVY = ["torch", "ray", "vllm", "triton", "transformers", "datasets", "tensorboard", "wandb"]
PLAN_SECONDS = 1.5

SCRIPT = """
import json, sys
from slipstream.configs.cli import main
sys.argv = ["slipstream", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps(sorted(set(sys.modules) & set({heavy}))))
"""


def run_python(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("arguments", [("plan", "quickstart"), ("plan", "smollm2"), ("--help",)])
def test_the_command_imports_nothing_heavy(arguments: tuple[str, ...]):
    out = run_python(SCRIPT.format(heavy=HEAVY), *arguments)
    assert json.loads(out.splitlines()[-1]) == []


def test_the_supervisor_imports_no_tensor_library():
    modules = "launch, live, show, track, api"
    out = run_python(
        f"import json, sys\nfrom slipstream.configs import {modules}\n"
        f"print(json.dumps(sorted(set(sys.modules) & set({HEAVY[:5]}))))"
    )
    assert json.loads(out) == []


def test_plan_answers_in_time():
    """In seconds of processor time: on a busy machine the clock measures the others, too."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python(SCRIPT.format(heavy=HEAVY), "plan", "quickstart")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if seconds[-1] < PLAN_SECONDS:
            return
    pytest.fail(f"plan took {min(seconds):.2f} s, more than {PLAN_SECONDS} s")

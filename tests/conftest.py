"""What all tests share: no network, no colours, one thread, no deadlines under load."""

import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton kernels run on CPU tensors; read when triton is imported, which torch does in passing.
os.environ.setdefault("TRITON_INTERPRET", "1")
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PY_COLORS"):
    os.environ.pop(name, None)

# The variables above must be set first.
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

sys.path.append(str(Path(__file__).parent / "bench"))
from common import emit  # noqa: E402

# A slow machine is no failure; what hypothesis finds is printed so that it can be repeated.
settings.register_profile("slipstream", deadline=None, print_blob=True)
settings.load_profile("slipstream")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="slow tests to docs/results/")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """With `--record`, a line per slow test in docs/results/test-long.jsonl.

    A seed is among the parameters in the test's name; what the test measured, such as each fault
    and how long recovery took, is what it gave to `record_property`.
    """
    report = yield
    ended = report.when == "call" or report.outcome != "passed"
    if ended and item.config.getoption("record") and item.get_closest_marker("slow"):
        emit(
            {
                "bench": "test-long",
                "case": item.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 1),
                "measured": [dict([pair]) for pair in report.user_properties],
            }
        )
    return report


RECOVERED = "recovered from "
"""Begins the name of a property that says how many seconds a run took after a fault."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config):
    """How long runs took after each kind of fault; with `--record` also to
    docs/results/chaos.jsonl, a line a kind."""
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist; who started it sums up what all of them found
    found: dict[str, list[float]] = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, value in report.user_properties:
                    if name.startswith(RECOVERED):
                        found[name.removeprefix(RECOVERED)].append(value)
    for fault, seconds_N in sorted(found.items()):
        middle, most = round(statistics.median(seconds_N), 1), max(seconds_N)
        after = f"training again after {middle:g} s (at most {most:g})"
        terminalreporter.write_line(f"{fault}: {len(seconds_N)} faults, {after}")
        if config.getoption("record"):
            emit(
                {
                    "bench": "chaos",
                    "case": fault,
                    "faults": len(seconds_N),
                    "seconds_median": middle,
                    "seconds_max": most,
                    "seconds": seconds_N,
                }
            )

"""The command line: each command calls one function, and says its errors in one message."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from slipstream.buffer.errors import SlipstreamError
from slipstream.configs import cli, exporting, launch
from typer.testing import CliRunner, Result

COMMANDS = ("new", "plan", "run", "resume", "stop", "sft", "export", "audit", "show")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_names_every_command(arguments: tuple[str, ...]):
    result = invoke(*arguments)
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


def test_new_writes_an_experiment_that_plan_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert "slipstream plan mine.toml" in invoke("new", "mine").output
    result = invoke("plan", "mine.toml", "learner.steps=5")
    assert result.exit_code == 0, result.output
    assert "command line" in result.output
    assert "\x1b" not in result.output


def test_plan_all_shows_the_defaults_too():
    assert "learner.updates_per_step" not in invoke("plan", "quickstart").output
    assert "learner.updates_per_step" in invoke("plan", "quickstart", "--all").output


def test_run_hands_on_experiment_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    given = []

    def run(loaded, output, *, export):
        given.append((loaded.experiment.learner.steps, output, export))
        return SimpleNamespace(exit_code=1)

    monkeypatch.setattr(launch, "run", run)
    folder = tmp_path / "a"
    arguments = ("run", "quickstart", "learner.steps=5", "--output", str(folder))
    assert invoke(*arguments).exit_code == 1
    assert invoke(*arguments, "--no-export").exit_code == 1
    assert given == [(5, folder, True), (5, folder, False)]


def test_seeds_make_sibling_runs_and_the_worst_end_counts(monkeypatch: pytest.MonkeyPatch):
    given = []

    def run_seeds(loaded, seeds, output, *, export):
        given.append((list(seeds), output))
        return [SimpleNamespace(exit_code=code) for code in (0, 1, 0)]

    monkeypatch.setattr(launch, "run_seeds", run_seeds)
    assert invoke("run", "quickstart", "--seeds", "0,1,2").exit_code == 1
    assert given == [([0, 1, 2], None)]


@pytest.mark.parametrize(
    ("command", "module", "name", "answer", "arguments"),
    [
        ("resume", launch, "resume", SimpleNamespace(exit_code=0), ("RUN",)),
        ("stop", launch, "stop", "RUN interrupted", ("RUN",)),
        (
            "export",
            exporting,
            "export",
            SimpleNamespace(path="OUT", check="equal"),
            ("RUN", "OUT"),
        ),
    ],
)
def test_a_command_calls_its_function(
    command: str,
    module: object,
    name: str,
    answer: object,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    calls = []
    monkeypatch.setattr(module, name, lambda *given, **_: (calls.append(given), answer)[1])
    result = invoke(command, *arguments)
    assert result.exit_code == 0, result.output
    assert calls[0][: len(arguments)] == tuple(Path(argument) for argument in arguments)


def test_an_error_is_one_message_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail() -> None:
        raise SlipstreamError("the [learner] is gone; resume it")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: the [learner] is gone; resume it\n"


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


def test_the_script_is_installed():
    script = Path(sys.executable).parent / "slipstream"
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "quickstart" in done.stdout

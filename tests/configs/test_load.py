"""Layers of TOML become one experiment, and every value says where it came from."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slipstream.buffer.errors import ConfigError
from slipstream.configs import toml
from slipstream.configs.layers import EXPERIMENTS_DIR, override_value
from slipstream.configs.load import load_experiment, load_table, with_overrides
from slipstream.configs.new import commented_toml, write_experiment
from slipstream.configs.reference import reference
from slipstream.configs.schema import Experiment, all_keys, all_sections

SHIPPED = sorted(path.stem for path in EXPERIMENTS_DIR.glob("*.toml"))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_load_under_their_own_name(name: str):
    assert load_experiment(name).experiment.name == name


def test_later_layers_win_and_origins_say_which(tmp_path: Path):
    write(tmp_path, "base.toml", "seed = 1\n[learner]\nsteps = 7\nprompts_per_step = 4\n")
    path = write(tmp_path, "mine.toml", 'extends = "base.toml"\n\n[learner]\nsteps = 9\n')
    loaded = load_experiment(path, ["learner.updates_per_step=2"])
    learner = loaded.experiment.learner
    assert (learner.steps, learner.prompts_per_step, learner.updates_per_step) == (9, 4, 2)
    assert loaded.origins["learner.steps"] == "mine.toml:4"
    assert loaded.origins["learner.prompts_per_step"] == "base.toml:4"
    assert loaded.origins["learner.updates_per_step"] == "command line"
    assert "learner.micro_batch_tokens" not in loaded.origins


def test_a_name_is_not_inherited(tmp_path: Path):
    path = write(tmp_path, "mine.toml", 'extends = "quickstart"\n')
    assert load_experiment(path).experiment.name == "mine"


def test_line_numbers_survive_strings_and_lists_over_several_lines():
    text = (
        'a = """\n[x]\nb = 1\n"""\n# c = 0\n[s."t.u"]\nc = [\n  1, # ]\n  2,\n]\nd.e = { f = 1 }\n'
    )
    _, lines = toml.parse(text, "text")
    expected = {"a": 1, "s": 6, "s.t.u": 6, "s.t.u.c": 7, "s.t.u.d": 11, "s.t.u.d.e": 11}
    assert lines == {**expected, "s.t.u.d.e.f": 11}


def test_sequential_mode_sets_the_bound_to_zero():
    loaded = load_table({"mode": "sequential"})
    assert loaded.experiment.buffer.max_staleness_steps == 0
    assert loaded.origins["buffer.max_staleness_steps"] == 'mode = "sequential"'


def test_sft_false_removes_an_inherited_warm_start():
    assert load_table({"sft": {"epochs": 2}}).experiment.sft is not None
    assert load_table({"sft": {"epochs": 2}}, ["sft=false"]).experiment.sft is None


def test_arguments_are_not_inherited_by_another_task(tmp_path: Path):
    base = '[prompts]\ntask = "chain_sum"\ntask_config = { min_terms = 2 }\n'
    write(tmp_path, "base.toml", base)
    other = write(tmp_path, "other.toml", 'extends = "base.toml"\n[prompts]\ntask = "gcd"\n')
    assert load_experiment(other).experiment.prompts.task_config == {}
    same = load_experiment(tmp_path / "base.toml", ["prompts.task_config.max_terms=3"])
    assert same.experiment.prompts.task_config == {"min_terms": 2, "max_terms": 3}


def test_paths_are_relative_to_the_file_they_are_written_in(tmp_path: Path):
    write(tmp_path, "data.jsonl", '{"prompt": "1", "answer": "1"}\n')
    write(tmp_path, "mine.py", "def score(completion, prompt):\n    return 1.0\n")
    text = '[prompts]\nsource = "dataset"\npath = "data.jsonl"\n[reward]\nname = "mine.py:score"\n'
    loaded = load_experiment(write(tmp_path, "mine.toml", text)).experiment
    assert loaded.prompts.path == str(tmp_path / "data.jsonl")
    assert loaded.reward.name == f"{tmp_path / 'mine.py'}:score"
    code = '[prompts]\nsource = "function"\ntask = "mine.py:row"\n'
    code += '[environment]\nname = "mine.py:Mine"\n'
    loaded = load_experiment(write(tmp_path, "code.toml", code)).experiment
    assert loaded.prompts.task == f"{tmp_path / 'mine.py'}:row"
    assert loaded.environment is not None
    assert loaded.environment.name == f"{tmp_path / 'mine.py'}:Mine"
    named = load_experiment(tmp_path / "mine.toml", ["prompts.path=owner/dataset"]).experiment
    assert named.prompts.path == "owner/dataset"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("1e-6", 1e-6),
        (".5", 0.5),
        ("true", True),
        ("module:function", "module:function"),
        ('"5"', "5"),
        ("[1, 2]", [1, 2]),
        ("", ""),
        ("{ a = 1 }", {"a": 1}),
        ("1.2.3", "1.2.3"),
        ('"x"\nseed = 7', '"x"\nseed = 7'),
    ],
)
def test_override_values_are_toml_or_bare_text(text: str, value: object):
    assert override_value(text) == value


@pytest.mark.parametrize("name", SHIPPED)
def test_the_source_text_of_a_run_is_the_whole_experiment(name: str, tmp_path: Path):
    write(tmp_path, "base.toml", f'extends = "{name}"\n[prompts]\nheld_out = 7\n')
    loaded = load_experiment(tmp_path / "base.toml", ["learner.steps=5", "sft=false"])
    again = load_experiment(write(tmp_path, "experiment.toml", loaded.source_text))
    assert again.experiment == loaded.experiment
    assert "# [prompts]" in loaded.source_text  # what the person wrote is kept to be read


def test_changed_values_are_in_the_source_text_and_keep_other_origins():
    loaded = with_overrides(load_experiment("quickstart"), ["seed=3", "name=x-seed3"], "--seeds")
    assert (loaded.experiment.seed, loaded.experiment.name) == (3, "x-seed3")
    assert loaded.origins["seed"] == "--seeds"
    assert loaded.origins["model"].startswith("quickstart.toml:")
    assert load_table(tomllib.loads(loaded.source_text)).experiment == loaded.experiment


keys = st.text("ab-. ")
values = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_written_values_are_read_back_unchanged(value: object):
    assert tomllib.loads(f"value = {toml.value_text(value)}") == {"value": value}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_experiment_written_as_toml_is_the_same_experiment(name: str):
    experiment = load_experiment(name).experiment
    text = toml.document(experiment.model_dump(mode="json", exclude_none=True), [*all_sections()])
    assert load_table(tomllib.loads(text)).experiment == experiment
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


@pytest.mark.parametrize("name", SHIPPED)
def test_a_new_experiment_is_its_base_with_and_without_the_comment_signs(name: str, tmp_path: Path):
    base = load_experiment(name, ['name="mine"']).experiment
    text = commented_toml("mine", name)
    assert load_table(tomllib.loads(text)).experiment.learner == base.learner
    lines = text.splitlines()
    uncommented = [line[2:] if line.startswith("# ") and " = " in line else line for line in lines]
    uncommented = [line.replace("# [", "[") for line in uncommented]
    everything = load_table(tomllib.loads("\n".join(uncommented))).experiment
    shown = {  # a section that the base does without shows its defaults
        section: getattr(base, section) or getattr(everything, section)
        for section in ("sft", "environment")
    }
    assert everything == base.model_copy(update=shown)


def test_a_new_experiment_explains_every_key(tmp_path: Path):
    text = write_experiment(tmp_path / "mine").read_text()
    for key in all_keys():
        assert f"{key.path.rpartition('.')[2]} " in text
    with pytest.raises(ConfigError, match="is there already"):
        write_experiment(tmp_path / "mine.toml")


def test_the_config_reference_is_what_the_schema_says():
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text() == reference(), "run `make docs`"

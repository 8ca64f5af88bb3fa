"""The code of a run on the nodes of a Ray cluster: what the head has installed, brought by Ray.

So all nodes run the same slipstream, and need only its dependencies. Ray would install a wheel with
these anew on every node, torch included (`pip install --target`): it gets the wheel's folders.
"""

import shutil
from importlib import metadata
from pathlib import Path

FOLDERS = ("buffer", "configs", "kernels", "learner", "rollout")
INFORMATION = ("METADATA", "entry_points.txt")
"""Of the installed distribution: its version, and the plug-ins it registers."""


def runtime_environment(folder: Path) -> dict[str, list[str]]:
    """Lay the installed code out in a folder, and say to Ray what to bring to each node.

    Args:
        folder: empty; needed until Ray has read it (`ray.init` returned).
    """
    root, installed = Path(__file__).parents[1], metadata.distribution("slipstream")
    package = folder / "slipstream"
    for name in FOLDERS:
        shutil.copytree(
            root / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    about = folder / f"slipstream-{installed.version}.dist-info"
    about.mkdir()
    for name in INFORMATION:
        # A checkout's egg-info, which `python -m` finds first there, has the same as PKG-INFO.
        other = "PKG-INFO" if name == "METADATA" else name
        (about / name).write_text(installed.read_text(name) or installed.read_text(other) or "")
    return {"py_modules": [str(package), str(about)]}

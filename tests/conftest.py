"""What all tests share: no network, no colours, one thread, no deadlines under load."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton kernels run on CPU tensors; read when triton is imported, which torch does in passing.
os.environ.setdefault("TRITON_INTERPRET", "1")
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PY_COLORS"):
    os.environ.pop(name, None)

from hypothesis import settings  # noqa: E402, the variables above must be set first

# A slow machine is no failure; what hypothesis finds is printed so that it can be repeated.
settings.register_profile("slipstream", deadline=None, print_blob=True)
settings.load_profile("slipstream")

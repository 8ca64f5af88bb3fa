"""Which implementation is chosen, and that the reason is said."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from slipstream.kernels import dispatch
from slipstream.kernels.definition import Head, KeptSets


def on_cuda(dtype=torch.bfloat16):
    """What `choose` reads of a tensor that cannot exist here."""
    size = torch.empty(0, dtype=dtype).element_size()
    device = torch.device("cuda", 0)
    return SimpleNamespace(is_cuda=True, device=device, dtype=dtype, element_size=lambda: size)


@pytest.mark.parametrize(
    ("hidden", "changes", "capability", "name", "reason"),
    [
        (torch.empty(1, 1), {}, (9, 0), "chunked", "on cpu"),
        (on_cuda(), {}, (9, 0), "triton", r"capability \(9, 0\)"),
        (on_cuda(), {}, (7, 5), "chunked", r"\(7, 5\) is below \(8, 0\)"),
        (on_cuda(torch.float64), {}, (9, 0), "chunked", "not torch.float64"),
        (on_cuda(torch.float32), {}, (9, 0), "chunked", "torch.float32 and torch.bfloat16"),
        (on_cuda(), {"kept": KeptSets(torch.empty(0), torch.empty(0))}, (9, 0), "chunked", "kept"),
    ],
)
def test_the_choice_says_why(monkeypatch, hidden, changes, capability, name, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    head = Head(torch.empty(1, 1, dtype=torch.bfloat16), torch.ones(1))._replace(**changes)
    choice = dispatch.choose(hidden, head)
    assert choice.name == name
    assert re.search(reason, choice.reason)


def test_without_triton_cuda_tensors_take_the_chunked_path(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: None)
    head = Head(torch.empty(1, 1, dtype=torch.bfloat16), torch.ones(1))
    choice = dispatch.choose(on_cuda(), head)  # pyright: ignore[reportArgumentType]
    assert choice == ("chunked", "triton is not installed (the extra `triton`)")


def test_the_loss_runs_on_a_cpu_where_triton_cannot_be_imported():
    script = """
import sys
sys.modules["triton"] = None
import torch
from slipstream.kernels import dispatch
from slipstream.kernels.definition import Head
hidden = torch.randn(3, 4, requires_grad=True)
head = Head(torch.randn(5, 4), torch.ones(3))
loss = lambda logprobs, entropy, rows: (-logprobs - entropy, {})
dispatch.full(hidden, torch.tensor([0, 1, 2]), head, loss).loss.backward()
assert hidden.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", script], check=True)

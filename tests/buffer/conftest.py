"""A buffer service in this process or in one of its own, on a short private socket."""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.service import BufferService

SpecMaker = Callable[..., ServiceSpec]


@pytest.fixture
def make_spec(tmp_path: Path) -> Iterator[SpecMaker]:
    """Specs of one run: two groups a step, two samples a group."""
    with tempfile.TemporaryDirectory(prefix="slip-") as socket_dir:

        def make(config: dict[str, Any] | None = None, **changes: Any) -> ServiceSpec:
            values: dict[str, Any] = {
                "run_id": "run",
                "run_dir": tmp_path,
                "endpoint": f"ipc://{socket_dir}/buffer",
                "config": BufferConfig(**(config or {})),
                "prompts_per_step": 2,
                "branch": 0,
            }
            return ServiceSpec(**{**values, **changes})

        yield make


@contextlib.asynccontextmanager
async def running(spec: ServiceSpec, name: str = "worker-0") -> AsyncIterator[BufferClient]:
    """A service as a task of this loop, and a client of it."""
    service = asyncio.create_task(BufferService(spec).serve())
    try:
        async with BufferClient(spec.endpoint, spec.run_id, name, timeout_s=10) as client:
            yield client
    finally:
        service.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await service


@contextlib.contextmanager
def service_process(spec: ServiceSpec) -> Iterator[subprocess.Popen[bytes]]:
    """A service process, killed at the end."""
    path = spec.run_dir / "spec.json"
    path.write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "slipstream.buffer.service", str(path)]
    with (spec.run_dir / "service.log").open("ab") as log:
        process = subprocess.Popen(command, env=os.environ, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

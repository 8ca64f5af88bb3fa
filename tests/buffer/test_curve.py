"""Beyond the file system the buffer answers only to the run's key."""

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest
from slipstream.buffer import curve
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.errors import ConfigError, PeerLost
from slipstream.buffer.service import BufferService


@pytest.fixture
def spec(tmp_path: Path) -> ServiceSpec:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return ServiceSpec(
        run_id="keyed", run_dir=tmp_path, endpoint=f"tcp://127.0.0.1:{port}",
        config=BufferConfig(), prompts_per_step=2, branch=0,
    )  # fmt: skip


async def test_only_who_knows_the_key_is_answered(
    spec: ServiceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in curve.new_keys().items():
        monkeypatch.setenv(key, value)
    service = asyncio.create_task(BufferService(spec).serve())
    async with BufferClient(spec.endpoint, "keyed", "worker-0") as client:
        assert (await client.stats()).counts == {}
    monkeypatch.setenv(curve.PUBLIC, curve.new_keys()[curve.PUBLIC])
    stranger = BufferClient(spec.endpoint, "keyed", "stranger", timeout_s=1.0)
    with pytest.raises(PeerLost):
        await stranger.connect()
    await stranger.close()
    service.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await service


async def test_without_keys_no_port_is_served_or_joined(spec: ServiceSpec) -> None:
    with pytest.raises(ConfigError, match="needs keys"):
        await BufferService(spec).serve()
    client = BufferClient(spec.endpoint, "keyed", "worker-0")
    with pytest.raises(ConfigError, match="needs keys"):
        await client.connect()
    await client.close()

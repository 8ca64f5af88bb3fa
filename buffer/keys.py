"""CURVE on every address that others can reach: keys made per run, readable by their owner alone.

The service proves itself with its key, and lets in exactly the clients that hold the run's client
key. ipc sockets (mode 0600) and loopback need none. Clients of other hosts get a copy of the file.
"""

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from .errors import ConfigError

KEYS_VARIABLE = "SLIPSTREAM_BUFFER_KEYS"
"""Names the key file for processes whose caller passes none."""
_NAMES = ("server_public", "server_secret", "client_public", "client_secret")


def needs_keys(endpoint: str) -> bool:
    """Whether an address is beyond ipc and loopback."""
    url = urlsplit(endpoint)
    return url.scheme not in ("ipc", "inproc") and url.hostname not in (
        "localhost", "127.0.0.1", "::1",
    )  # fmt: skip


def make_keys(path: Path) -> Path:
    """Make a run's keys unless they are there; mode 0600 from the first byte on."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys = [key.decode() for _ in range(2) for key in zmq.curve_keypair()]
        temporary = path.with_suffix(f".{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(dict(zip(_NAMES, keys, strict=True)), file)
        os.replace(temporary, path)
    return path


def secure_server(
    socket: zmq.asyncio.Socket, context: zmq.asyncio.Context, path: Path
) -> AsyncioAuthenticator:
    """Let in only who holds the client key; the authenticator has to be stopped in the end."""
    keys = _read(path)
    authenticator = AsyncioAuthenticator(context)

    class OnlyTheRuns:
        """The credentials provider that pyzmq asks."""

        def callback(self, domain: str, key: bytes) -> bool:
            return key == keys["client_public"]

    authenticator.configure_curve_callback(domain="*", credentials_provider=OnlyTheRuns())
    authenticator.start()
    socket.curve_secretkey, socket.curve_publickey = keys["server_secret"], keys["server_public"]
    socket.curve_server = True
    return authenticator


def secure_client(socket: zmq.asyncio.Socket, endpoint: str, path: Path | None) -> None:
    """Use the run's client key.

    Raises:
        ConfigError: the address needs keys, and there are none.
    """
    named = path or os.environ.get(KEYS_VARIABLE)
    if not named:
        raise ConfigError(
            f"{endpoint} can be reached from outside, so that it needs the run's keys: pass the "
            f"file keys/buffer.json of the run folder, or name it in {KEYS_VARIABLE}"
        )
    keys = _read(Path(named))
    socket.curve_secretkey, socket.curve_publickey = keys["client_secret"], keys["client_public"]
    socket.curve_serverkey = keys["server_public"]


def _read(path: Path) -> dict[str, bytes]:
    """The four keys.

    Raises:
        ConfigError: the file is missing, readable by others, or holds no keys.
    """
    try:
        mode = path.stat().st_mode & 0o777
        found = json.loads(path.read_bytes())
        keys = {name: str(found[name]).encode() for name in _NAMES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no keys of a buffer service: {error!r}") from error
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:o}): chmod 600 {path}")
    return keys

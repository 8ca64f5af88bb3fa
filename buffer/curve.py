"""Keys for sockets beyond this machine's file system: CURVE, one server key pair a run.

The launcher makes the pair and hands it to the run's processes in their environment, never in a
file or a command line. A client must know the server's public key to say anything, so that key is
the run's token; what passes is encrypted. Without keys nothing but `ipc://` is served or joined.
"""

import os

import zmq

from .errors import ConfigError

PUBLIC, SECRET = "SLIPSTREAM_CURVE_PUBLIC", "SLIPSTREAM_CURVE_SECRET"


def new_keys() -> dict[str, str]:
    """A fresh pair, as the environment of a run's processes; only the service needs `SECRET`."""
    public, secret = zmq.curve_keypair()
    return {PUBLIC: public.decode(), SECRET: secret.decode()}


def protect_server(socket: zmq.Socket, endpoint: str) -> None:
    """Have a socket that is about to be bound ask for the run's key.

    Raises:
        ConfigError: the endpoint is no `ipc://` and there are no keys.
    """
    if _needs_keys(endpoint, SECRET):
        socket.setsockopt(zmq.CURVE_SECRETKEY, os.environ[SECRET].encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, os.environ[PUBLIC].encode())
        socket.setsockopt(zmq.CURVE_SERVER, 1)


def protect_client(socket: zmq.Socket, endpoint: str) -> None:
    """Have a socket that is about to connect show that it knows the run's key.

    Raises:
        ConfigError: the endpoint is no `ipc://` and there is no key.
    """
    if _needs_keys(endpoint, PUBLIC):
        public, secret = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, os.environ[PUBLIC].encode())


def _needs_keys(endpoint: str, key: str) -> bool:
    if endpoint.startswith("ipc://"):
        return False
    if not os.environ.get(key):
        raise ConfigError(f"{endpoint} is reachable by others and needs keys: {key} is not set")
    return True

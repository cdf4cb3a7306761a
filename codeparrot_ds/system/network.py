"""Network addresses of this machine."""

import socket


def free_port() -> str:
    """A free port on the loopback address, for ranks on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])

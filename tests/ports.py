"""Ports for the servers of the tests."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    """Outside of the range from which Ray takes ports for its workers."""
    for port in range(22_000 + os.getpid() % 8_000, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise AssertionError("no free port")

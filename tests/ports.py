"""Ports for the servers of the tests."""

from __future__ import annotations

import itertools
import os
import socket

# Outside of the range from which Ray takes ports for its workers, and of the system's own choices.
_FIRST, _OF_A_PROCESS, _PROCESSES = 22_000, 2_500, 4


def _range() -> range:
    """Of this process: beside another of pytest-xdist, a port that is free may be about to go."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = _FIRST + worker % _PROCESSES * _OF_A_PROCESS
    return range(first, first + _OF_A_PROCESS)


# Another run of the tests on this machine begins elsewhere.
_PORTS = itertools.islice(itertools.cycle(_range()), os.getpid() % _OF_A_PROCESS, None)


def free_ports(count: int) -> list[int]:
    """None of them is given twice, so that each is free until its server takes it."""
    found: list[int] = []
    for port in itertools.islice(_PORTS, _OF_A_PROCESS):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))  # Ray listens on the node's address, not on localhost
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free port")


def free_port() -> int:
    return free_ports(1)[0]

"""Ports for servers that are told theirs."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from surogate import ports
from surogate.errors import UnavailableError


def test_a_free_port_is_none_that_connections_are_given_by_themselves() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if first < ports._FIRST + ports._COUNT:
        pytest.skip(f"this machine gives connections the ports {first} to {last}")
    assert not first <= ports.free_port() <= last


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(ports, "_FIRST", taken.getsockname()[1])
        monkeypatch.setattr(ports, "_COUNT", 1)
        with pytest.raises(UnavailableError, match="is free on this machine"):
            ports.free_port()

"""Fixtures: the daemon that most tests share, and one of its own for tests that break it."""

from __future__ import annotations

import pytest
from daemon import Daemon


@pytest.fixture(scope="session")
def shared_daemon():
    daemon = Daemon()
    yield daemon
    daemon.stop()


@pytest.fixture
def socket(shared_daemon, monkeypatch):
    """The path of the shared daemon's socket. The environment that torchrun sets is not there."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "EPD_SOCKET"):
        monkeypatch.delenv(variable, raising=False)
    assert shared_daemon.process.poll() is None, shared_daemon.log()
    return shared_daemon.socket


@pytest.fixture
def own_daemon():
    daemon = Daemon()
    yield daemon
    daemon.stop()

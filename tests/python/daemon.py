"""A real daemon on the host backend for the tests: starts, finds its worker, stops."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

START_S = 20
STOP_S = 20


class Daemon:
    """One daemon in a directory of its own, which goes with it."""

    def __init__(self, devices: int = 4) -> None:
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="epd-python-"))
        self.socket = str(self.directory / "epd.sock")
        self._log = self.directory / "log"
        # With a test run that crashes the daemon goes, too.
        command = ["setpriv", "--pdeathsig", "TERM", os.environ["EPD_BINARY"]]
        command += ["--backend", "host", "--devices", str(devices), "--socket", self.socket]
        command += ["--control-socket", str(self.directory / "control.sock")]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait_until(self._accepts, "does not accept", START_S)

    def worker(self) -> int:
        """The pid of the worker process; 0 while there is none."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def kill_worker(self) -> None:
        """Kills the worker and waits for the next one."""
        old = self.worker()
        os.kill(old, signal.SIGKILL)
        self._wait_until(lambda: self.worker() not in (0, old), "has no new worker", START_S)

    def stop(self) -> None:
        """Stops the daemon and asserts that it ends well."""
        self.process.terminate()
        try:
            assert self.process.wait(STOP_S) == 0, self.log()
        finally:
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.directory)

    def log(self) -> str:
        return self._log.read_text()

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            return probe.connect_ex(self.socket) == 0 and self.worker() != 0

    def _wait_until(self, condition, what: str, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"daemon ended with {self.process.returncode}:\n{self.log()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"daemon {what} within {limit_s} s:\n{self.log()}")
            time.sleep(0.01)

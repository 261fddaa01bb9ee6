"""A PostgreSQL server of the tests' own: in a temporary folder, on a loopback port, as an unprivileged user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from surogate.ports import free_port
from surogate.weights.memory import MemoryDirectory

USER = "surogate"
START_SECONDS = 240.0
_WATCHER = """
import os, signal, subprocess, sys, threading
user = {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, **user)
threading.Thread(target=lambda: os._exit(server.wait()), daemon=True).start()
sys.stdin.read()
server.send_signal(signal.SIGQUIT)
server.wait()
"""
"""Runs the server until its own standard input ends, as it does with the tests, however they end; ends with it too."""


def programs() -> Path | None:
    """The folder of initdb and pg_ctl; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    named = shutil.which("initdb")
    return found[0].parent if found else Path(named).parent if named else None


class Postgres:
    """One server. `stop` and `start` it as often as a test wants."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._bin = bin_folder
        # PostgreSQL refuses to run as root.
        self._as: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}
        if self._as:
            shutil.chown(folder, **self._as)
        self._run("initdb", "--username", USER, "--auth", "trust", "--no-sync", "--encoding", "UTF8")
        self._databases = 0
        self._watcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server, and waits until it answers. It ends with this process, however that does."""
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "off"}
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [str(self._bin / "postgres"), "-D", str(self._folder / "data"), *flags]
        with (self._folder / "log").open("a") as log:
            self._watcher = subprocess.Popen(
                [sys.executable, "-c", _WATCHER, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        until = time.monotonic() + START_SECONDS
        while True:
            assert self._watcher.poll() is None and time.monotonic() < until, (self._folder / "log").read_text()
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                time.sleep(0.05)

    def stop(self, mode: str = "fast") -> None:
        """Stops it: `fast` ends all connections, `immediate` is a crash."""
        if self._watcher is not None:
            if (self._folder / "data" / "postmaster.pid").exists():
                self._run("pg_ctl", "-w", "-m", mode, "stop")
            self._watcher.communicate(timeout=START_SECONDS)
            self._watcher = None

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/{name}"

    def disconnect_all(self) -> int:
        """Cuts every connection of others, as a network or a failover does; returns how many."""
        query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        return int(self.execute(f"{query} AND usename = '{USER}'")[0][0])

    def execute(self, query: str) -> list[tuple[Any, ...]]:
        """Runs one statement on the server's own database."""
        dsn = f"host=127.0.0.1 port={self.port} user={USER} dbname=postgres"
        with psycopg.connect(dsn, autocommit=True) as connection:
            cursor = connection.execute(query)
            return list(cursor.fetchall()) if cursor.description else []

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), "-D", str(self._folder / "data"), *arguments]
        # To a file: the server keeps what it inherits open, and a pipe would never end.
        with (self._folder / f"{program}.out").open("w") as out:
            done = subprocess.run(command, stdout=out, stderr=out, cwd="/", timeout=240, check=False, **self._as)
        assert done.returncode == 0, (self._folder / f"{program}.out").read_text()


@contextmanager
def postgres_server(bin_folder: Path) -> Iterator[Postgres]:
    """A running server."""
    folder = MemoryDirectory(Path(tempfile.gettempdir()))  # not in memory, but it removes what killed tests have left
    try:
        server = Postgres(folder.path, bin_folder)
        try:
            server.start()
            yield server
        finally:
            server.stop("immediate")
    finally:
        folder.close()

"""What all tests share: caches of their own, one thread of torch, no limits on time for Hypothesis."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.task_stacks import waiting_tasks

if TYPE_CHECKING:
    from tests.helpers.postgres import Postgres

_CACHE = tempfile.TemporaryDirectory(prefix="surogate-test-cache-")
os.environ["SUROGATE_CACHE_DIR"] = _CACHE.name

# Models of the tests are tiny: more threads would only wait for each other, in child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more of the machine than of the code.
settings.register_profile("surogate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("surogate")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Says where tasks wait when a test has failed: those of its event loop, which its fixtures end later."""
    report = yield
    if report.failed and (told := waiting_tasks()):
        report.sections.append(("asyncio tasks", told))
    return report


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for this process' tests; they are skipped where it is not installed."""
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is missing: pip install 'surogate[postgres]'")
    from tests.helpers.postgres import postgres_server, programs

    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is missing: apt install postgresql")
    with postgres_server(found) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty job store: the test runs on each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()

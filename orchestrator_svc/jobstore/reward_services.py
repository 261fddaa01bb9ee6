"""Reward services that took the place of the configured ones while a job ran, as the store keeps them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Boolean, Column, Connection, Double, ForeignKey, String, Table, Text, delete, insert, select

from orchestrator_svc.jobstore.schema import metadata

MULTI_TURN = "multi_turn"
"""Where a job's runner keeps the keys of its environments that answer turns, for whoever replaces their services."""

replaced = Table(
    "job_reward_services",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("environment", String(255), primary_key=True),
    # A shadow scores beside the service that counts.
    Column("shadow", Boolean, primary_key=True),
    Column("address", Text, nullable=False),
    Column("tls", Boolean, nullable=False),
    Column("token_env", Text, nullable=False),
    Column("set_time", Double, nullable=False),
)


@dataclass(frozen=True)
class ReplacedService:
    """A service for one environment of a job."""

    environment: str
    """Key of the environment in the job."""
    shadow: bool
    address: str
    tls: bool = False
    token_env: str = ""
    set_time: float = 0.0
    """Seconds since the epoch: the same address set again is another service."""


def replace_service(connection: Connection, job_id: str, service: ReplacedService) -> None:
    """Writes the service in the place of an earlier one; without an address the configured one is meant again."""
    mine = (replaced.c.job_id == job_id) & (replaced.c.environment == service.environment)
    connection.execute(delete(replaced).where(mine, replaced.c.shadow == service.shadow))
    if service.address:
        row = {**service.__dict__, "job_id": job_id, "set_time": time.time()}
        connection.execute(insert(replaced), row)


def replaced_services(connection: Connection, job_id: str) -> list[ReplacedService]:
    """The services of a job that are not the configured ones."""
    columns = [replaced.c[name] for name in ReplacedService.__dataclass_fields__]
    rows = connection.execute(select(*columns).where(replaced.c.job_id == job_id)).all()
    return [ReplacedService(*row) for row in rows]

"""The ledger of a GRPO job: which prompts were drawn, what became of each, and the samples of every step.

A draw is written before anything is generated for it, and gets its one end in the transaction that prepares its step. A
step's samples are in the ledger before the trainer sees them, and stay until a checkpoint covers them. So whatever is
killed, and whenever: draws without an end belong to steps that were not prepared, and are drawn again, the same ones;
prepared steps can be trained again, bit for bit.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from orchestrator_svc.grpo.configured.difficulty import Moves, Pool
from orchestrator_svc.grpo.groups import Cause, Draw, Dropped, Group
from orchestrator_svc.jobstore.database import JOB_PATIENCE, Database
from orchestrator_svc.jobstore.schema import metadata
from surogate.v1 import trainer_pb2

Write = Callable[[Callable[[Connection], None]], Awaitable[None]]

T = TypeVar("T")
_COMPRESSION = 1  # samples are mostly small numbers: the fastest level halves them


class DrawState(StrEnum):
    """Where a drawn prompt is. All but DRAWN are ends."""

    DRAWN = "drawn"
    TRAINED = "trained"
    DROPPED = "dropped"


class StepState(StrEnum):
    """How far a step has come."""

    PREPARED = "prepared"
    """Its samples are in the ledger."""
    TRAINED = "trained"
    """The trainer has answered."""
    PUSHED = "pushed"
    """Its weights serve: it is done."""


draws = Table(
    "grpo_draws",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", BigInteger, primary_key=True, autoincrement=False),
    Column("step", BigInteger, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("deck", String(255), nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("cause", String(32), nullable=False, default=""),
    Column("oldest_version", BigInteger),
    Column("newest_version", BigInteger),
    Column("reward", Double),
    Column("scored_by", Text, nullable=False, default=""),
    Index("grpo_draws_by_state", "job_id", "state", "step"),
)

steps = Table(
    "grpo_steps",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("num_samples", BigInteger, nullable=False),
    # A zlib-compressed surogate.v1.TrainStepSamples; NULL once a checkpoint covers the step.
    Column("samples", LargeBinary),
    Column("metrics", JSON, nullable=False),
)

laid_aside = Table(
    "grpo_laid_aside",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("prompt", Text, primary_key=True),
    Column("pool", String(16), nullable=False),
)

evaluations = Table(
    "grpo_evaluations",
    metadata,
    Column("job_id", ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("environment", String(255), primary_key=True),
    Column("metrics", JSON, nullable=False),
)


@dataclass(frozen=True)
class StepRow:
    """One step as the ledger has it."""

    step: int
    state: StepState
    metrics: dict[str, float]


@dataclass(frozen=True)
class OpenDraw:
    """A draw that has no end yet: it is drawn again."""

    ordinal: int
    step: int
    prompt: str


class Ledger:
    """Reads and writes one job's rows. Methods that return a function are for `JobContext.emit(also=…)`."""

    def __init__(self, database: Database, job_id: str, write: Write) -> None:
        """`write` runs a function in a transaction that fails when the job is no longer this orchestrator's."""
        self._database = database
        self._job_id = job_id
        self._write = write

    async def open_draws(self) -> list[OpenDraw]:
        """Draws without an end, by ordinal."""
        query = (
            select(draws.c.ordinal, draws.c.step, draws.c.prompt)
            .where(self._mine(draws), draws.c.state == DrawState.DRAWN)
            .order_by(draws.c.ordinal)
        )
        return await self._read(lambda c: [OpenDraw(*row) for row in c.execute(query)])

    async def next_ordinal(self) -> int:
        """One more than the highest ordinal that was drawn; 0 for a new job."""
        query = select(func.max(draws.c.ordinal)).where(self._mine(draws))
        newest = await self._read(lambda c: c.execute(query).scalar())
        return 0 if newest is None else int(newest) + 1

    async def next_positions(self) -> dict[str, int]:
        """Where each deck goes on: one more than the highest position that was drawn of it."""
        query = select(draws.c.deck, func.max(draws.c.position) + 1).where(self._mine(draws)).group_by(draws.c.deck)
        rows = await self._read(lambda c: c.execute(query).all())
        return {deck: int(position) for deck, position in rows}

    async def laid_aside(self) -> dict[str, Pool]:
        """Prompts that are not drawn, by key."""
        query = select(laid_aside.c.prompt, laid_aside.c.pool).where(self._mine(laid_aside))
        rows = await self._read(lambda c: c.execute(query).all())
        return {key: Pool(pool) for key, pool in rows}

    async def last_step(self) -> StepRow | None:
        """The newest prepared step; None for a new job."""
        query = select(steps.c.step, steps.c.state, steps.c.metrics).where(self._mine(steps))
        query = query.order_by(steps.c.step.desc()).limit(1)
        row = await self._read(lambda c: c.execute(query).one_or_none())
        return row and StepRow(row.step, StepState(row.state), dict(row.metrics))

    async def step_metrics(self) -> dict[int, dict[str, float]]:
        """Metrics of every finished step, by step."""
        query = select(steps.c.step, steps.c.metrics).where(self._mine(steps), steps.c.state == StepState.PUSHED)
        rows = await self._read(lambda c: c.execute(query.order_by(steps.c.step)).all())
        return {row.step: dict(row.metrics) for row in rows}

    async def evaluations(self) -> dict[tuple[int, str], dict[str, float]]:
        """Metrics of every evaluation, by step and environment."""
        query = select(evaluations).where(self._mine(evaluations)).order_by(evaluations.c.step)
        rows = await self._read(lambda c: c.execute(query).all())
        return {(row.step, row.environment): dict(row.metrics) for row in rows}

    async def samples(self, step: int) -> list[trainer_pb2.TrainingSample] | None:
        """Samples of a prepared step; None when there is no such step, or a checkpoint has covered it."""
        query = select(steps.c.samples).where(self._mine(steps), steps.c.step == step)
        blob = await self._read(lambda c: c.execute(query).scalar())
        return None if blob is None else list(trainer_pb2.TrainStepSamples.FromString(zlib.decompress(blob)).samples)

    async def metrics(self, step: int) -> dict[str, float]:
        """Metrics of a prepared step, as far as they are known."""
        query = select(steps.c.metrics).where(self._mine(steps), steps.c.step == step)
        return dict(await self._read(lambda c: c.execute(query).scalar_one()))

    async def draw(self, drawn: Sequence[Draw], moves: Moves) -> None:
        """Writes new draws, and the prompts that were moved for them."""
        rows = [
            {
                "job_id": self._job_id,
                "ordinal": draw.ordinal,
                "step": draw.step,
                "prompt": draw.prompt.key,
                "deck": draw.deck,
                "position": draw.position,
                "state": DrawState.DRAWN,
            }
            for draw in drawn
        ]

        def work(connection: Connection) -> None:
            if rows:
                connection.execute(insert(draws), rows)
            self._move(connection, moves)

        await self._write(work)

    async def prepare(
        self,
        step: int,
        samples: Sequence[trainer_pb2.TrainingSample],
        metrics: Mapping[str, float],
        trained: Sequence[Group],
        dropped: Sequence[Dropped],
        moves: Moves,
    ) -> None:
        """Writes a step's samples, the end of every draw that went into it, and the prompts that were moved after it,
        in one transaction."""
        blob = await asyncio.to_thread(_pack, samples)
        row = {
            "job_id": self._job_id,
            "step": step,
            "state": StepState.PREPARED,
            "num_samples": len(samples),
            "samples": blob,
            "metrics": dict(metrics),
        }

        def work(connection: Connection) -> None:
            connection.execute(insert(steps), row)
            for group in trained:
                self._end(connection, group.draw, step, **_trained(group))
            for drop in dropped:
                self._end(connection, drop.draw, step, **_dropped(drop))
            self._move(connection, moves)

        await self._write(work)

    async def move(self, moves: Moves) -> None:
        """Writes that prompts were laid aside, or brought back."""
        if moves:
            await self._write(lambda connection: self._move(connection, moves))

    async def mark_trained(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes that the trainer has answered, and what it said."""
        await self._write(self._set(step, StepState.TRAINED, metrics))

    def mark_pushed(self, step: int, metrics: Mapping[str, float]) -> Callable[[Connection], None]:
        """Writes that the step is done."""
        return self._set(step, StepState.PUSHED, metrics)

    def mark_evaluated(self, step: int, environment: str, metrics: Mapping[str, float]) -> Callable[[Connection], None]:
        """Writes an evaluation."""
        row = {"job_id": self._job_id, "step": step, "environment": environment, "metrics": dict(metrics)}
        return lambda connection: _ignore(connection.execute(insert(evaluations), row))

    def cover(self, step: int) -> Callable[[Connection], None]:
        """Forgets the samples of steps up to `step`: a checkpoint has them."""
        covered = self._mine(steps) & (steps.c.step <= step) & steps.c.samples.is_not(None)
        return lambda connection: _ignore(connection.execute(update(steps).where(covered).values(samples=None)))

    async def close(self, cause: Cause) -> None:
        """Ends every draw that has no end: the job goes no further."""
        query = update(draws).where(self._mine(draws), draws.c.state == DrawState.DRAWN)
        await self._write(lambda c: _ignore(c.execute(query.values(state=DrawState.DROPPED, cause=cause))))

    async def _read(self, query: Callable[[Connection], T]) -> T:
        return await self._database.read(query, patience=JOB_PATIENCE)

    def _set(self, step: int, state: StepState, metrics: Mapping[str, float]) -> Callable[[Connection], None]:
        query = update(steps).where(self._mine(steps), steps.c.step == step)
        return lambda connection: _ignore(connection.execute(query.values(state=state, metrics=dict(metrics))))

    def _end(self, connection: Connection, draw: Draw, step: int, **values: Any) -> None:
        one = self._mine(draws) & (draws.c.ordinal == draw.ordinal) & (draws.c.state == DrawState.DRAWN)
        changed = connection.execute(update(draws).where(one).values(step=step, **values)).rowcount
        assert changed == 1, f"draw {draw.ordinal} has ended before"

    def _move(self, connection: Connection, moves: Moves) -> None:
        for key, pool in moves.items():
            connection.execute(delete(laid_aside).where(self._mine(laid_aside), laid_aside.c.prompt == key))
            if pool is not None:
                connection.execute(insert(laid_aside), {"job_id": self._job_id, "prompt": key, "pool": pool})

    def _mine(self, table: Table) -> Any:
        return table.c.job_id == self._job_id


def _trained(group: Group) -> dict[str, Any]:
    return {"state": DrawState.TRAINED, **_facts(group)}


def _dropped(drop: Dropped) -> dict[str, Any]:
    return {
        "state": DrawState.DROPPED,
        "cause": drop.cause,
        **(_facts(drop.group) if drop.group else {}),
    }


def _facts(group: Group) -> dict[str, Any]:
    reward = float(group.rewards.mean())
    return {
        "oldest_version": group.oldest_version,
        "newest_version": group.newest_version,
        "reward": reward if math.isfinite(reward) else None,
        "scored_by": group.scored_by,
    }


def _pack(samples: Sequence[trainer_pb2.TrainingSample]) -> bytes:
    return zlib.compress(trainer_pb2.TrainStepSamples(samples=samples).SerializeToString(), _COMPRESSION)


def _ignore(_: object) -> None:
    return None

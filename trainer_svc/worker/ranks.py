"""The processes that train one model together: who is there, and what they say to each other.

They find each other as those of torchrun do, by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Rank 0 has
the connection to the trainer's front, passes every command on (see follower.py), and alone writes files. With one
process nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from surogate.errors import DataLossError, SurogateError

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long the first waits for the last of the processes, which may be on other nodes."""

EXCHANGE_TIMEOUT = timedelta(hours=1)
"""How long one waits for the others in an exchange: they may be tokenizing, or writing a checkpoint."""

_LOOK = timedelta(seconds=60)
"""How often a rank that waits for a command asks again. Rank 0's end closes the connection and is seen at once."""

_KEPT_COMMANDS = 64
"""Announcements that stay in the store; every rank has long seen older ones."""

_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
"""Words of errors that say no more than that another process is gone."""

T = TypeVar("T")


class Ranks:
    """This process among `world_size`; `rank` 0 is the first. Make one with `join`."""

    def __init__(self, rank: int = 0, world_size: int = 1, store: Store | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._commands = 0

    @classmethod
    def join(cls) -> Ranks:
        """Waits until all are there, if the environment names more than one."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size <= 1:
            return cls()
        rank = int(os.environ["RANK"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, world_size, is_master=rank == 0, timeout=JOIN_TIMEOUT
        )
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=EXCHANGE_TIMEOUT,
        )
        return cls(rank, world_size, store)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share_of(self, items: Sequence[T]) -> list[T]:
        """The items that this rank works on: every `world_size`-th."""
        return list(items[self.rank :: self.world_size])

    def rounds(self, items: Sequence[object]) -> int:
        """How many of them the busiest rank works on."""
        return -(-len(items) // self.world_size)

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def gather_at_first(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks, on rank 0; nothing on others."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] | None = [None] * self.world_size if self.first else None
        dist.gather_object(value, values, dst=0)
        return values or []  # type: ignore[return-value]

    def of_first(self, value: T) -> T:
        """What rank 0 says."""
        if self.world_size == 1:
            return value
        values = [value if self.first else None]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]  # type: ignore[return-value]

    def by_first(self, work: Callable[[], T]) -> T:
        """Has rank 0 do something; all get its result, or the DataLossError that it raised."""
        if self.world_size == 1:
            return work()
        result, refusal = None, None
        if self.first:
            try:
                result = work()
            except DataLossError as error:
                refusal = (error.message, error.reason)
        result, refusal = self.of_first((result, refusal))
        if refusal is not None:
            raise DataLossError(refusal[0], reason=refusal[1])
        return result  # type: ignore[return-value]

    def first_goes_first(self, work: Callable[[], T]) -> T:
        """Has rank 0 do something before the others do it too: what it leaves on disk is there for them."""
        if not self.first:
            self.of_first(None)
            return work()
        found = work()
        self.of_first(None)
        return found

    def announce(self, command: bytes) -> None:
        """Passes a command on to all others. Rank 0 alone."""
        if self._store is None:
            return
        self._commands += 1
        self._store.set(f"command/{self._commands}", str(len(command)))
        if self._commands > _KEPT_COMMANDS:
            self._store.delete_key(f"command/{self._commands - _KEPT_COMMANDS}")
        dist.broadcast(torch.frombuffer(bytearray(command), dtype=torch.uint8), src=0)

    def await_command(self) -> bytes:
        """Waits for the next command, however long. Raises an error for which `only_lost` holds if rank 0 is gone."""
        assert self._store is not None
        self._commands += 1
        key = f"command/{self._commands}"
        while True:
            try:
                self._store.wait([key], _LOOK)
                break
            except dist.DistStoreError:  # nothing yet; a lost connection is a DistNetworkError
                continue
        received = torch.empty(int(self._store.get(key)), dtype=torch.uint8)
        dist.broadcast(received, src=0)
        return received.numpy().tobytes()

    def lost(self, error: BaseException) -> bool:
        """Whether an error says no more than that another process is gone: that one's own end is what matters."""
        if self.world_size == 1 or not isinstance(error, RuntimeError) or isinstance(error, SurogateError):
            return False
        return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)

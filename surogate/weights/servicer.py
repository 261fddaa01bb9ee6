"""WeightUpdateService over a Staging; the service that has a model to swap supplies the commit."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf import empty_pb2

from surogate.errors import FailedPreconditionError, InvalidInputError
from surogate.v1 import weights_pb2, weights_pb2_grpc
from surogate.weights import metrics
from surogate.weights.staging import Commit, Staging, Update

SERVICE = "surogate.v1.WeightUpdateService"


class WeightUpdateServicer(weights_pb2_grpc.WeightUpdateServiceServicer):
    """Takes updates into `staging` and hands each that is committed to `commit`.

    `confirm()` is called when somebody says that the served version is the one to serve.
    """

    def __init__(self, staging: Staging, commit: Commit, confirm: Callable[[], None] | None = None) -> None:
        self._staging = staging
        self._commit = commit
        self._confirm = confirm

    async def CreateWeightUpdate(  # noqa: N802
        self, request: weights_pb2.CreateWeightUpdateRequest, _context: Any
    ) -> weights_pb2.WeightUpdate:
        """Announces an update."""
        return (await self._staging.create(request.update_id, request.manifest)).to_proto()

    async def UploadWeights(  # noqa: N802
        self, request_iterator: AsyncIterator[weights_pb2.UploadWeightsRequest], _context: Any
    ) -> weights_pb2.WeightUpdate:
        """Takes one stream of chunks; verifies the image if it is whole when the stream ends."""
        start = time.perf_counter()
        update: Update | None = None
        staged_by_caller = False
        async for request in request_iterator:
            update = update or self._staging.get(request.update_id)
            if request.update_id not in ("", update.update_id):
                raise InvalidInputError("update_id: a stream uploads to one update; open another stream")
            if request.staged_by_caller:
                staged_by_caller = True
            elif request.data:
                await self._staging.write(update, request.offset, request.data, request.xxh3)
        if update is None:
            raise InvalidInputError("update_id: the stream had no message")
        metrics.UPDATE_SECONDS.labels("upload").observe(time.perf_counter() - start)
        return (await self._staging.finish(update, staged_by_caller=staged_by_caller)).to_proto()

    async def CommitWeightUpdate(  # noqa: N802
        self, request: weights_pb2.CommitWeightUpdateRequest, _context: Any
    ) -> weights_pb2.WeightUpdate:
        """Swaps to the update."""
        return (await self._staging.commit(self._staging.get(request.update_id), self._commit)).to_proto()

    async def AbortWeightUpdate(  # noqa: N802
        self, request: weights_pb2.AbortWeightUpdateRequest, _context: Any
    ) -> empty_pb2.Empty:
        """Drops an update."""
        await self._staging.abort(request.update_id)
        return empty_pb2.Empty()

    async def GetWeightUpdate(  # noqa: N802
        self, request: weights_pb2.GetWeightUpdateRequest, _context: Any
    ) -> weights_pb2.WeightUpdate:
        """Returns an update."""
        return self._staging.get(request.update_id).to_proto()

    async def ConfirmWeights(  # noqa: N802
        self, request: weights_pb2.ConfirmWeightsRequest, _context: Any
    ) -> empty_pb2.Empty:
        """Takes note that the served version is the one to serve."""
        served = self._staging.served_version
        if request.version != served:
            raise FailedPreconditionError(
                f"policy version {served} is served, not {request.version}",
                reason="STALE_POLICY",
                metadata={"served": str(served), "asked": str(request.version)},
            )
        if self._confirm is not None:
            self._confirm()
        return empty_pb2.Empty()

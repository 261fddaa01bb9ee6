"""Whether an announced weight update fits the model that is served: told before a byte is uploaded."""

from __future__ import annotations

from collections.abc import Iterator

from inference_svc.adapter_checks import check_adapter
from inference_svc.model_files import OUTPUT_HEAD, ModelFiles
from inference_svc.violations import FLOATS, refuse, wrong_dtype
from surogate.errors import FailedPreconditionError, Violation
from surogate.v1 import weights_pb2

_EMBEDDING = "embed_tokens.weight"


class UpdateChecks:
    """Checks manifests against the served checkpoint `files`; adapters up to `max_lora_rank`, 0 for none."""

    def __init__(self, files: ModelFiles, max_lora_rank: int) -> None:
        self._files = files
        self._max_rank = max_lora_rank

    def check(self, manifest: weights_pb2.WeightManifest) -> None:
        """Raises InvalidInputError naming the tensors that do not fit, FailedPreconditionError for a kind not taken."""
        if manifest.kind != weights_pb2.WEIGHT_KIND_LORA:
            self._check_weights(manifest)
        elif self._max_rank == 0:
            raise FailedPreconditionError(
                "adapters cannot be pushed: the replica was started with enable_lora: false", reason="LORA_DISABLED"
            )
        else:
            check_adapter(manifest, self._files, self._max_rank)

    def _check_weights(self, manifest: weights_pb2.WeightManifest) -> None:
        if self._files.config.get("quantization_config"):
            raise FailedPreconditionError(
                "the served checkpoint is quantised: full weights cannot replace it", reason="QUANTIZED_MODEL"
            )
        wrong = list(self._wrong_tensors(manifest))
        if manifest.kind != weights_pb2.WEIGHT_KIND_DELTA:
            optional = {OUTPUT_HEAD} if self._files.tied else set()
            missing = self._files.tensors.keys() - {spec.name for spec in manifest.tensors} - optional
            wrong += [Violation(name, "is missing: a full update brings every tensor") for name in sorted(missing)]
        refuse(wrong)

    def _wrong_tensors(self, manifest: weights_pb2.WeightManifest) -> Iterator[Violation]:
        for spec in manifest.tensors:
            shape = self._shape(spec.name)
            if shape is None:
                yield Violation(spec.name, "the model has no such tensor")
            elif tuple(spec.shape) != shape:
                yield Violation(spec.name, f"has shape {list(spec.shape)}; {list(shape)} is expected")
            elif spec.dtype not in FLOATS:
                yield wrong_dtype(spec)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        tensors = self._files.tensors
        if name == OUTPUT_HEAD and self._files.tied and name not in tensors:
            return next((info.shape for other, info in tensors.items() if other.endswith(_EMBEDDING)), None)
        return tensors[name].shape if name in tensors else None

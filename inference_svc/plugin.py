"""vLLM's general plugin (entry point `vllm.general_plugins`): what runs in every process that vLLM starts."""

from __future__ import annotations

import copy
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

WEIGHT_BACKEND = "surogate-image"
"""Name under which our weight transfer engine is registered with vLLM."""

ENGINE_LOG = "SUROGATE_ENGINE_LOG"
"""Variable with the format and the level of the engine's logs; set where the inference service is the parent."""

ENGINE_FAILURE = "SUROGATE_ENGINE_FAILURE"
"""Variable with the file that the engine's process writes into what it failed with: vLLM tells its parent no more than
that it did."""

_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Registers what we add to vLLM; in a child process of the service, ties its life to the parent's.

    vLLM calls this in every process that has this package, the user's own too: there only the registration happens.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if WEIGHT_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            WEIGHT_BACKEND, "inference_svc.vllm_backend.weight_image", "ImageWeightTransferEngine"
        )
    if ENGINE_LOG not in os.environ:
        return
    if current_platform.is_cpu():
        # vLLM chooses this class by platform and has no setting for it.
        wrapper = "inference_svc.vllm_backend.dense_lora.DenseLoraWrapper"
        type(current_platform).get_punica_wrapper = classmethod(lambda _cls: wrapper)
        _let_experts_be()
    log_format, level = os.environ[ENGINE_LOG].split()
    if multiprocessing.parent_process() is not None:
        die_with_parent()
        lock_bars_by_thread()
        _configure_logs(log_format, level)
        if file := os.environ.get(ENGINE_FAILURE):
            logging.getLogger("vllm").addHandler(_FailureFile(Path(file)))
    # vLLM warns at every start of what is as it should be here; that is for those who debug.
    logging.getLogger("vllm").setLevel(logging.DEBUG if level == "debug" else logging.ERROR)


class _FailureFile(logging.Handler):
    """Keeps in a file the message of the last exception that was logged as an error, while there is a folder for it."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and self._file.parent.is_dir():
            self._file.write_text(str(error) or type(error).__name__, encoding="utf-8")


def _let_experts_be() -> None:
    """Lets mixtures of experts compute on CPUs beside adapters.

    Where any layer may have an adapter vLLM takes a kernel for the experts that knows adapters, which needs a GPU. No
    adapter of ours is on experts, so they get the kernel that they have without.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as experts

    choose = experts.select_unquantized_moe_backend

    def choose_without_adapters(moe_config: Any) -> Any:
        plain = copy.copy(moe_config)
        plain.is_lora_enabled = False
        return choose(moe_config=plain)

    experts.select_unquantized_moe_backend = choose_without_adapters


def die_with_parent() -> None:
    """Asks the kernel for a SIGKILL when the parent dies, however it dies: the engine's state is worth nothing then.

    Ctrl-C reaches the whole process group; the parent alone decides when the engine ends, so it is ignored here.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not sys.platform.startswith("linux"):
        return
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)


def lock_bars_by_thread() -> None:
    """Gives progress bars a lock of this process alone. tqdm's own is a semaphore in /dev/shm, which stays there when
    the process is killed together with the one that would clear up after it."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


def _configure_logs(log_format: str, level: str) -> None:
    """Our form for the engine's lines."""
    from surogate.telemetry import log

    log.configure(log_format, level)  # type: ignore[arg-type]

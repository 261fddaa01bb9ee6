"""Starting vLLM: in a thread of its own, so that the service answers while the model loads."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

from vllm import __version__ as vllm_version
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from inference_svc.engine_api import EngineFacts
from inference_svc.model_files import ModelFiles, is_local, read_model
from inference_svc.options import EngineOptions
from inference_svc.plugin import ENGINE_FAILURE
from inference_svc.vllm_backend.arguments import engine_arguments
from inference_svc.vllm_backend.engine import VllmEngine
from surogate.errors import ConfigError, SurogateError, Violation

_ADAPTED_LAYERS = (".o_proj.weight", ".dense.weight", ".out_proj.weight", ".down_proj.weight")
"""Ends of the names of a layer that every adapter may have: one of them is in nearly every architecture."""

_NOT_INSPECTED = "failed to be inspected"
"""What vLLM says of an architecture whose code it could not import."""

_NO_ADAPTERS = re.compile(r"\w+ does not support LoRA|Model .* is not supported for LoRA")
"""What vLLM says of an architecture that it has no adapters for."""


async def load_engine(options: EngineOptions) -> tuple[VllmEngine, ModelFiles]:
    """Starts vLLM; returns once the model is loaded and can generate. Raises ConfigError naming what is wrong.

    The kernel ends the engine's process when the thread that started it ends, so that thread stays until the process
    exits, whatever way it does.
    """
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[tuple[AsyncLLM, ModelFiles]] = loop.create_future()

    def settle(result: tuple[AsyncLLM, ModelFiles] | None, error: Exception | None) -> None:
        if loaded.cancelled():
            if result is not None:
                result[0].shutdown(timeout=0)
        elif error is not None:
            loaded.set_exception(error)
        elif result is not None:
            loaded.set_result(result)

    def run() -> None:
        try:
            result, failure = _load(options), None
        except Exception as error:  # noqa: BLE001 - handed to the event loop
            result, failure = None, error
        loop.call_soon_threadsafe(settle, result, failure)
        threading.Event().wait()

    threading.Thread(target=run, name="engine-parent", daemon=True).start()
    llm, files = await loaded
    engine = VllmEngine(llm, _facts(llm, options), adapted_module(files) if options.enable_lora else None)
    await engine.prepare()
    return engine, files


def _load(options: EngineOptions) -> tuple[AsyncLLM, ModelFiles]:
    if current_platform.is_cpu():
        # Compiled pieces of the sampler would cost the first request seconds, and a C++ compiler.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    files = read_model(Path(options.model)) if is_local(options.model) else None
    with tempfile.TemporaryDirectory(prefix="surogate-engine-") as folder:
        failure = Path(folder) / "failure"
        os.environ[ENGINE_FAILURE] = str(failure)
        try:
            llm = AsyncLLM.from_engine_args(engine_arguments(options, files))
        except SurogateError:
            raise
        except Exception as error:
            text = failure.read_text(encoding="utf-8") if failure.exists() else str(error)
            raise _refusal(options, text or type(error).__name__) from error
    return llm, files or read_model(_snapshot(options.model))


def _refusal(options: EngineOptions, text: str) -> ConfigError:
    """What vLLM (or pydantic) says of a model, by its first lines, as an error of the key that is to be changed."""
    if found := _NO_ADAPTERS.search(text):
        return _no_adapters(f"vLLM takes no adapters for it ({found.group()})")
    if _NOT_INSPECTED in text and find_spec("torchvision") is None:
        text += "\nIf it is of several modalities, it needs torchvision, which is not installed here."
    lines = [line.strip() for line in text.splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    return ConfigError.of([Violation("model", f"vLLM cannot serve {options.model}: {' '.join(lines[:4])[:500]}")])


def _snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _facts(llm: AsyncLLM, options: EngineOptions) -> EngineFacts:
    config = llm.model_config
    return EngineFacts(
        model=options.model,
        engine=f"vllm {vllm_version}",
        dtype=str(config.dtype).removeprefix("torch."),
        max_model_len=int(config.max_model_len),
        max_num_seqs=int(llm.vllm_config.scheduler_config.max_num_seqs),
        vocab_size=int(config.get_vocab_size()),
        lora_enabled=options.enable_lora,
        max_lora_rank=options.lora_rank_limit if options.enable_lora else 0,
    )


def adapted_module(files: ModelFiles) -> tuple[str, int, int]:
    """A linear layer that every adapter may have: its name, outputs and inputs."""
    for end in _ADAPTED_LAYERS:
        for name, info in sorted(files.tensors.items()):
            if name.endswith(end) and len(info.shape) == 2:
                return name.removesuffix(".weight"), info.shape[0], info.shape[1]
    raise _no_adapters(f"none of its layers is one that adapters are known for (*{', *'.join(_ADAPTED_LAYERS)})")


def _no_adapters(why: str) -> ConfigError:
    what = f"{why}; set enable_lora: false in infer.yaml: merged weights are pushed instead of the adapter"
    return ConfigError.of([Violation("enable_lora", what)])

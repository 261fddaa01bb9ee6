"""A program: trains tiny models of many architectures by GRPO steps and pushes them into vLLM, all in one process each.

`python -m tests.helpers.models.pushed_models FOLDER NAME-MODE…` prints one JSON object a case. NAME-MODE-saved, after
NAME-MODE, serves what that saved (an adapter merged into the model), and compares it with transformers. torch and vLLM,
which take most of the time to import, are imported once; each case runs in a fork. What lies between the two in a job,
the services and the wire, is left out: other tests have that.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPERATURE = 0.7
PROMPT = [*range(10, 60)]
STEPS = 2
RANK = 8
IMPORTED = ("inference_svc.vllm_backend.loading", "vllm.v1.engine.llm_engine", "trainer_svc.worker.engine")
TARGETS = {
    "experts": ["all", "experts"], "qexperts": ["q_proj", "experts"],
    "head": ["q_proj", "lm_head"], "embed": ["q_proj", "embed_tokens"],
}  # fmt: skip
"""What adapters are on where it is not all linear layers."""
MERGED = ("experts", "qexperts", "embed", "merged")
"""Modes in which the sampler is given merged weights: it is started without adapters, but for `embed`."""
ROPES = ("linear", "yarn", "llama3")
"""Modes that stretch the model's context, with LoRA."""
STRETCHED = 1024


def main(folder: Path, cases: Sequence[str]) -> None:
    """Runs the cases, one after the other."""
    os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from inference_svc import environment
    from inference_svc.settings import InferenceSettings

    environment.prepare(InferenceSettings())
    for module in IMPORTED:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)  # threads do not survive the forks to come
    for case in cases:
        name, _, mode = case.rpartition("-")
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                found = saved(folder / name) if mode == "saved" else run(folder / case, name, mode)
            except BaseException as error:  # noqa: BLE001 - told to the test
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            for peer in multiprocessing.active_children():
                peer.kill()
            print(json.dumps({"case": case, **found}), flush=True)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            print(json.dumps({"case": case, "error": f"ended with status {status}"}), flush=True)


def run(folder: Path, name: str, mode: str) -> dict[str, Any]:
    """Distances of logprobs of trainer and sampler, as loaded and after each push, and how far training moved them."""
    from surogate.rope import as_object
    from tests.helpers.models.architectures import make_model

    lora = mode != "full"
    make_model(name, folder / "model")
    train = {
        "model": str(folder / "model"), "torch_dtype": "float32", "sequence_len": 200, "max_steps": STEPS,
        "optimizer": "adamw", "learning_rate": 1e-2 if lora else 1e-3, "lora": lora, "lora_rank": RANK,
        "lora_alpha": 16, "lr_scheduler_type": "constant",
        **({"lora_target_modules": TARGETS[mode]} if mode in TARGETS else {}),
        **({"qlora_bnb": True} if mode in ("qlora", "qexperts") else {}),
        **({"rope_scaling": mode, "max_model_len": STRETCHED} if mode in ROPES else {}),
    }  # fmt: skip
    adapters = lora and (mode not in MERGED or mode == "embed")
    trainer = Peer(trainer_of, folder, train, lora and not adapters)
    sampler = Sampler(folder / "model", adapters, as_object(mode, STRETCHED) if mode in ROPES else None)
    found: dict[str, Any] = {"pushed": [], "moved": [], "kl": [], "kinds": []}
    if mode in ("qlora", "qexperts"):
        base = trainer.call("export", 0)
        sampler.push(base.manifest, Path(base.path))
    found["loaded"] = distance(trainer, sampler)
    for version in range(1, STEPS + 1):
        before = trainer.scored([PROMPT])[0]
        metrics = trainer.call("train", version, sampler.samples())
        found["kl"].append(metrics["mismatch_kl"])
        after = trainer.scored([PROMPT])[0]
        found["moved"].append(max(abs(a - b) for a, b in zip(before, after, strict=True)))
        exported = trainer.call("export", version)
        sampler.push(exported.manifest, Path(exported.path))
        found["kinds"].append(exported.manifest.kind)
        found["pushed"].append(distance(trainer, sampler))
    trainer.call("save")
    return found


def saved(folder: Path) -> dict[str, Any]:
    """Distance of logprobs of vLLM and transformers, each with the model that a case saved."""
    from trainer_svc.worker.commands.merge import merge

    model = folder / "out"
    if (model / "adapter_config.json").exists():
        merge(model, str(folder / "model"), model := folder / "merged")
    return {"saved": distance(Peer(plain_of, model), Sampler(model, lora=False))}


def distance(trainer: Peer, sampler: Sampler) -> float:
    """Largest distance of the sampler's logprobs from the trainer's."""
    completions = sampler.generate()
    expected = trainer.scored([[*PROMPT, *ids] for ids, _ in completions])
    return max(
        abs(a - b)
        for (_, ours), theirs in zip(completions, expected, strict=True)
        for a, b in zip(ours, theirs[len(PROMPT) - 1 :], strict=True)
    )


class Peer:
    """What computes logprobs in a process of its own: vLLM changes classes of transformers in its."""

    def __init__(self, make: Callable[..., Mapping[str, Callable[..., Any]]], *arguments: Any) -> None:
        fork = multiprocessing.get_context("fork")
        self._pipe, theirs = fork.Pipe()
        fork.Process(target=_answer, args=(theirs, make, arguments), daemon=True).start()
        self._take()

    def call(self, what: str, *arguments: Any) -> Any:
        """What one of its functions returns."""
        self._pipe.send((what, arguments))
        return self._take()

    def scored(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Logprobs of all tokens but the first."""
        found: list[list[float]] = self.call("score", sequences)
        return found

    def _take(self) -> Any:
        found, error = self._pipe.recv()
        if error:
            raise RuntimeError(error)
        return found


def _answer(pipe: Any, make: Callable[..., Mapping[str, Callable[..., Any]]], arguments: Sequence[Any]) -> None:
    what, functions = "", {"": lambda *given: functions.update(make(*given))}  # type: ignore[var-annotated]
    while True:
        try:
            pipe.send((functions[what](*arguments), None))
        except Exception as error:  # noqa: BLE001 - told to the other side
            pipe.send((None, f"{type(error).__name__}: {error}"))
        what, arguments = pipe.recv()


def trainer_of(folder: Path, train: Mapping[str, Any], merge: bool) -> dict[str, Callable[..., Any]]:
    """The training worker."""
    from surogate.v1 import trainer_pb2
    from tests.helpers.models.engine import open_engine

    engine, _ = open_engine("grpo", folder / "out", train, merge_pushes=merge)

    def score(sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        items = [{"ids": ids} for ids in sequences]
        request = trainer_pb2.ComputeLogprobsRequest(temperature=TEMPERATURE, sequences=items)
        return [list(item.logprobs) for item in engine.compute_logprobs(request).sequences]

    return {
        "score": score,
        "train": lambda step, samples: dict(engine.train_step(step, samples)),
        "export": lambda version: engine.export_weights(version, str(folder)),
        "save": lambda: engine.checkpoint(final=True).path,
    }


def plain_of(model: Path) -> dict[str, Callable[..., Any]]:
    """The model as transformers computes it."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")

    @torch.no_grad()
    def score(sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        found = []
        for ids in map(torch.tensor, sequences):
            logprobs = (loaded(ids[None]).logits[0, :-1].double() / TEMPERATURE).log_softmax(-1)
            found.append(logprobs.gather(-1, ids[1:, None])[:, 0].tolist())
        return found

    return {"score": score}


class Sampler:
    """vLLM in this process, started and given weights as the inference service does."""

    def __init__(self, model: Path, lora: bool, rope_scaling: Mapping[str, Any] | None = None) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        from inference_svc.model_files import read_model
        from inference_svc.options import EngineOptions
        from inference_svc.update_checks import UpdateChecks
        from inference_svc.vllm_backend.arguments import engine_arguments
        from inference_svc.vllm_backend.loading import adapted_module

        files = read_model(model)
        options = EngineOptions(
            str(model), dtype="float32", max_num_seqs=8, enable_lora=lora, max_lora_rank=RANK, rope_scaling=rope_scaling
        )
        self._engine = LLMEngine.from_engine_args(engine_arguments(options, files), enable_multiprocessing=False)
        self._engine.set_weight_version("0")
        self._files = sorted({str(info.file) for info in files.tensors.values()})
        self._checks = UpdateChecks(files, RANK if lora else 0)
        self._count = 0
        self._adapted = adapted_module(files) if lora else None
        self._load_zero_adapter()

    def generate(self, n: int = 4) -> list[tuple[list[int], list[float]]]:
        """Completions of the prompt: ids and logprobs."""
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest

        from inference_svc.vllm_backend.requests import completion, sampling_params
        from surogate.v1 import common_pb2

        params = sampling_params(common_pb2.SamplingParams(temperature=TEMPERATURE, max_tokens=40, seed=1), 100, n=n)
        adapter = LoRARequest("policy", 1, "policy") if self._adapted else None
        self._count += 1
        self._engine.add_request(str(self._count), tokens_input(PROMPT), params, lora_request=adapter)
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        items = [completion(item) for output in outputs for item in output.outputs]
        assert len(items) == n
        return [(list(item.token_ids), list(item.logprobs)) for item in items]

    def samples(self) -> list[Any]:
        """Rollouts to train on, every second one good and the others bad."""
        from surogate.v1 import trainer_pb2

        return [
            trainer_pb2.TrainingSample(
                sample_id=f"{index}",
                token_ids=[*PROMPT, *ids],
                loss_mask=[False] * len(PROMPT) + [True] * len(ids),
                sampler_logprobs=[0.0] * len(PROMPT) + logprobs,
                advantage=(-1.0) ** index,
                temperature=TEMPERATURE,
            )
            for index, (ids, logprobs) in enumerate(self.generate())
        ]

    def push(self, manifest: Any, image: Path) -> None:
        """Takes an update that fits."""
        from inference_svc.vllm_backend.fused_adapter import split_fused
        from surogate.v1 import weights_pb2

        self._checks.check(manifest)
        if manifest.kind == weights_pb2.WEIGHT_KIND_LORA:
            with tempfile.TemporaryDirectory() as folder:
                os.link(image, Path(folder) / "adapter_model.safetensors")
                (Path(folder) / "adapter_config.json").write_text(manifest.adapter_config_json)
                split_fused(Path(folder), self._engine.collective_rpc("fused_layers")[0])
                self._load_adapter(Path(folder))
        else:
            below = self._files if manifest.kind == weights_pb2.WEIGHT_KIND_DELTA else []
            self._engine.collective_rpc("start_weight_update")
            self._engine.collective_rpc("update_weights", kwargs={"update_info": {"paths": [str(image), *below]}})
            self._engine.collective_rpc("finish_weight_update")
            self._load_zero_adapter()
        self._engine.reset_prefix_cache()

    def _load_zero_adapter(self) -> None:
        from inference_svc.vllm_backend.zero_adapter import zero_adapter

        if self._adapted is not None:
            with zero_adapter(*self._adapted) as directory:
                self._load_adapter(directory)

    def _load_adapter(self, directory: Path) -> None:
        from vllm.lora.request import LoRARequest

        self._engine.add_lora(LoRARequest("policy", 1, str(directory), load_inplace=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

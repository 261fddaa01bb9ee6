"""Writes docs/configuration.md from the models: `python -m surogate.config.reference > docs/configuration.md`."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo

from surogate.config import cluster, data, env, lora, loss, model, optim, orch, ruler, sampling, shaping, train
from surogate.config.base import shown
from surogate.config.infer import InferConfig

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m surogate.config.reference`; change the models, not this file. -->

A job is one YAML file for pretraining and fine-tuning (`train.yaml`), three for GRPO (`train.yaml`, `infer.yaml`,
`orch.yaml`). `surogate config check FILE…` validates them and prints what they resolve to.

- Whole numbers go up to 1,000,000,000, unless their key says otherwise.
- A key that is not known is an error that names the nearest known one. A key that is known and not supported yet is an
  error too. Some keys tune engines that this is not: they are accepted with a warning. Both are listed at the end.
- Files follow YAML 1.2: `2e-4` is a number; only `true` and `false` are booleans. A key must not be there twice.
- `--set key=value` changes a key from the command line (`--set env.0.args.n=5` reaches into lists and blocks); for GRPO
  the file stands in front: `--set train.learning_rate=1e-4`.
- The files of a GRPO job must agree. A key that one of them leaves unset is taken from the others; set differently in
  two of them, it is an error: the model (`model`, in orch.yaml `model.name`), `max_steps`, `sequence_len` and
  `seq_len`, `max_async_level`, LoRA rank and alpha, `rope_scaling`. `dtype` of infer.yaml
  follows `torch_dtype`; `max_lora_rank`, `max_model_len`, `ckpt.interval` and `ckpt.keep_last` follow the other files
  unless they are set. Set differently, `output_dir` is that of orch.yaml, with a warning.
"""

CLUSTER = """\
Optional, for jobs of every kind: what their pods get where the orchestrator's launcher is `kubernetes`; with another
launcher it has no effect. Names of Kubernetes (`nodeSelector`, `mountPath`) are taken too. What may be asked for is the
operator's to allow: see [Jobs as pods](kubernetes-launcher.md)."""

TRAIN_THEMES = (
    ("Run", model.RunKeys),
    ("Model", model.ModelKeys),
    ("Batch", model.BatchKeys),
    ("Optimiser", optim.OptimizerKeys),
    ("LoRA", lora.LoraKeys),
    ("Data", data.DataKeys),
    ("Chat", data.ChatKeys),
    ("GRPO", train.GrpoKeys),
    ("Memory", optim.MemoryKeys),
    ("Devices", optim.ParallelKeys),
    ("Precision", optim.PrecisionKeys),
    ("QLoRA", lora.QloraKeys),
    ("Reporting", train.ReportingKeys),
    ("Automation", train.AutomationKeys),
)
DATASETS = (
    ("`datasets[]`, every type", data.DatasetBase),
    ("`type: text`", data.TextDataset),
    ("`type: instruction`", data.InstructionDataset),
    ("`type: conversation`", data.ConversationDataset),
)
LOSSES = (
    ("`type: ipo`", loss.IpoLoss),
    ("`type: aipo`", loss.AipoLoss),
    ("`type: dppo`", loss.DppoLoss),
    ("`type: grpo | bnpo | dr_grpo | dapo | cispo | gspo`", loss.ClipLoss),
)
ORCH_BLOCKS = (
    ("`model`", orch.PolicyConfig),
    ("`env[]`", env.EnvConfig),
    ("`sampling`", sampling.SamplingConfig),
    ("`sampling.temp_scheduler`", sampling.TemperatureSchedule),
    ("`advantage`", shaping.AdvantageConfig),
    ("`client`", orch.ClientConfig),
    ("`ckpt`", orch.CheckpointConfig),
    ("`eval`", env.EvalConfig),
    ("`report_to`", orch.TrackerConfig),
    ("`buffer`", shaping.BufferConfig),
    ("`filters[]`", shaping.FilterConfig),
    ("`ruler`", ruler.RulerConfig),
    ("`ruler.judge`", ruler.JudgeConfig),
    ("`ruler.cost`", ruler.CostConfig),
)

CLUSTER_BLOCKS = (
    ("`trainer`, `inference`, `reward`", cluster.PodConfig),
    ("`trainer` also has", cluster.TrainerPods),
    ("`inference` also has", cluster.InferencePods),
    ("`resources`", cluster.Resources),
    ("`tolerations[]`", cluster.Toleration),
    ("`volumes[]`", cluster.Volume),
    ("`empty_dir`", cluster.EmptyDir),
    ("`secrets[]`", cluster.SecretVariable),
)


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## train.yaml\n"]
    parts += [table(title, block) for title, block in TRAIN_THEMES]
    parts += [table(title, block, without=_fields(data.DatasetBase, block)) for title, block in DATASETS]
    parts += ["### `loss`\n", f"{_sentence(loss)}\n"]
    parts += [table(title, block, level=4) for title, block in LOSSES]
    parts += [table("`noise_scheduler`", train.NoiseScheduler), table("`distributed`", optim.DistributedKeys)]
    parts += ["## infer.yaml\n", table("", InferConfig)]
    parts += ["## orch.yaml\n", table("", orch.OrchConfig)]
    parts += [table(title, block) for title, block in ORCH_BLOCKS]
    parts += ["## cluster.yaml\n", f"{CLUSTER}\n", table("", cluster.ClusterConfig)]
    parts += [table(title, block, without=_inherited(block)) for title, block in CLUSTER_BLOCKS]
    parts.append(_leftovers())
    return "\n".join(parts)


def _fields(base: type[BaseModel], block: type[BaseModel]) -> frozenset[str]:
    return frozenset(base.model_fields) if block is not base else frozenset()


def _inherited(block: type[BaseModel]) -> frozenset[str]:
    return frozenset(cluster.PodConfig.model_fields) if block is not cluster.PodConfig else frozenset()


def _sentence(module: types.ModuleType) -> str:
    """The module's docstring without its first sentence."""
    return (module.__doc__ or "").partition("\n\n")[2].strip()


def table(title: str, block: type[BaseModel], *, without: Iterable[str] = (), level: int = 3) -> str:
    """The keys of a model as a Markdown table under a heading."""
    head = [f"{'#' * level} {title}\n", f"{(block.__doc__ or '').strip()}\n"] if title else []
    rows = [_row(name, field) for name, field in block.model_fields.items() if name not in set(without)]
    return "\n".join([*head, "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    cells = (f"`{name}`", type_name(field.annotation), _default(field), meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, RootModel):
        return "ipo"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {item}' for key, item in value.items())}}}`"
    return f"`{value if isinstance(value, str) else shown(value)}`"


NAMES: dict[Any, str] = {
    bool: "true, false",
    int: "integer",
    float: "number",
    str: "string",
    Any: "any",
    type(None): "null",
}


def type_name(annotation: Any) -> str:
    """A type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in NAMES:
        return NAMES[annotation]
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(item) for item in args))
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return "mapping"
    return "block"


def _leftovers() -> str:
    groups = (("train.yaml", train.TrainConfig), ("infer.yaml", InferConfig), ("orch.yaml", orch.OrchConfig))
    blocks = (("client.", orch.ClientConfig), ("ckpt.", orch.CheckpointConfig), ("distributed.", optim.DistributedKeys))
    lines = ["## Keys without effect\n", "Accepted, with a warning.\n"]
    for name, block in groups:
        lines.append(f"- {name}: {_listed(block.without_effect)}")
    lines += [f"- {name.removesuffix('.')}: {_listed(block.without_effect)}" for name, block in blocks]
    lines += ["\n## Keys to come\n", "Known, and refused as not supported yet.\n"]
    lines += [f"- {name}: {_listed(block.not_yet)}" for name, block in groups]
    return "\n".join([*lines, ""])


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys))


if __name__ == "__main__":
    sys.stdout.write(reference())

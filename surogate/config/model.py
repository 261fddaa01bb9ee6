"""Keys of train.yaml: the run and the model."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from surogate.config.base import (
    MAX_NUMBER,
    ConfigModel,
    Count,
    LocalFolder,
    OutputFolder,
    Seed,
    Size,
    Text,
    Tokens,
    one_of,
    problem,
    refuse,
)
from surogate.config.types import Dtype, RopeScaling

MAX_WORKERS = 1024


def _is_steps(value: object) -> bool:
    return type(value) is int and (value == -1 or 0 < value <= MAX_NUMBER)


def _is_workers(value: object) -> bool:
    return value == "auto" or (type(value) is int and 0 <= value <= MAX_WORKERS)


Steps = Annotated[int, one_of(_is_steps, f"must be -1 or a whole number of 1 to {MAX_NUMBER}")]
"""A number of steps of which -1 stands for "not limited"."""


Workers = Annotated[int | str, one_of(_is_workers, f"must be auto or a whole number of 0 to {MAX_WORKERS}")]
"""A number of processes, or `auto`."""


class RunKeys(ConfigModel):
    """What is trained from what, for how long, and where it is saved."""

    model: Text
    """Folder of a Hugging Face model, or its name on the hub. In a GRPO job it may be set in any of the three files."""
    run_name: Text = "auto"
    """Name of the run for people. `auto` makes one."""
    output_dir: LocalFolder = "output"
    """Folder of metrics, logs, plots and the final model or adapter, on disk. GRPO: see output_dir of orch.yaml."""
    checkpoint_dir: OutputFolder | None = None
    """Folder of the checkpoints, or `s3://BUCKET/PREFIX` of an object store, which gets the final model or adapter too
    (`PREFIX/final`). null = output_dir.
    """
    resume_from_checkpoint: bool = True
    """Go on from the newest complete checkpoint, if there is one. false starts anew."""
    save_steps: Count = 50
    """Optimiser steps between checkpoints, ≥ 0. 0 = only at the end."""
    save_total_limit: Annotated[Size, Field(le=1_000_000)] = 5
    """Number of checkpoints to keep, 1 to 1,000,000; older ones are deleted."""
    from_scratch: bool = False
    """Start from random weights of the model's configuration instead of its trained ones."""
    num_epochs: Annotated[Size, Field(le=1_000_000)] = 3
    """Passes over the data, 1 to 1,000,000, where max_steps does not say when to end. No meaning in GRPO."""
    max_steps: Steps = -1
    """Optimiser steps in all, ≥ 1. -1 = from num_epochs and the data. GRPO needs it, in this file or in orch.yaml."""
    logging_steps: Size = 1
    """Optimiser steps between reported metrics, ≥ 1."""
    train_seed: Seed = 1234
    """Seed of weights that are made, dropout and the order of training data, 0 to 2³² − 1."""
    eval_seed: Seed = 1234
    """Seed of the choice and order of held-out data, 0 to 2³² − 1."""


class ModelKeys(ConfigModel):
    """How the model is loaded and how long its sequences are."""

    model_type: Text = "auto"
    """Architecture. `auto` takes it from the model's config.json; another value must be the same."""
    torch_dtype: Dtype = "auto"
    """Dtype of weights and computation. float32 means float32 throughout, without autocast. `auto`: the model's own."""
    sequence_len: Tokens = 1024
    """Length of a (packed) training sequence in tokens, 1 to 16,777,216. GRPO: equal to seq_len of orch.yaml, 2048 if
    neither is set.
    """
    max_model_len: Tokens | None = None
    """Context length in tokens that rope_scaling extends to, 1 to 16,777,216. null = the model's own."""
    rope_scaling: RopeScaling = None
    """RoPE scaling: a name (linear, dynamic, yarn, longrope, llama3; with max_model_len), or a JSON object with
    rope_type, and factor or max_model_len. longrope needs an object, with its factors. Where layers with a window have
    rotations of their own (Gemma 3), it is for the others. null = the model's own.
    """

    @model_validator(mode="after")
    def _rope_needs_length(self) -> Self:
        if isinstance(self.rope_scaling, str) and self.max_model_len is None:
            refuse("train", [problem("rope_scaling", "needs max_model_len, the length to scale to")])
        return self


class BatchKeys(ConfigModel):
    """How samples make up an optimiser step."""

    per_device_train_batch_size: Annotated[Size, Field(le=65_536)] = 2
    """Sequences in a micro-batch on one device, 1 to 65,536."""
    gradient_accumulation_steps: Annotated[Size, Field(le=1 << 20)] = 4
    """Micro-batches in an optimiser step, 1 to 1,048,576. GRPO: a step takes as many as its rollouts need."""
    sample_packing: bool = True
    """Put several samples into one sequence; attention and positions stay inside each."""
    eval_steps: Size = 100
    """Optimiser steps between evaluations on held-out data (PT, SFT), ≥ 1."""
    dataloader_num_workers: Workers = "auto"
    """Threads that read the data of coming steps ahead (PT, SFT), 0 to 1,024. 0 = none. `auto` = 2 on a GPU, 0 on a
    CPU.
    """
    pad_to_multiple_of: Tokens = 1
    """Sequences are padded to a multiple of this many tokens, 1 to sequence_len."""

    @model_validator(mode="after")
    def _padding_fits(self) -> Self:
        limit = getattr(self, "sequence_len", self.pad_to_multiple_of)
        if self.pad_to_multiple_of > limit:
            text = f"is {self.pad_to_multiple_of}, more than sequence_len ({limit})"
            refuse("train", [problem("pad_to_multiple_of", text)])
        return self

"""A model of one's own, from random weights to reinforcement learning, on a laptop, in a few minutes.

Makes a small Qwen3 model, pretrains it on Python's documentation, teaches it half of a task, and lets GRPO teach the
rest: with the commands and the files that a user would take. docs/quickstart-grpo.md says what happens and why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import data
import model
from progress import Progress, fingerprint, open_progress
from shell import INTERRUPTED, CommandFailedError, end_on_sigterm, surogate
from summary import write_summary

EXAMPLES = Path("examples")
DEFAULT_OUTPUT = Path("outputs/quickstart")
"""The folder that the YAML files name."""

DEFAULT_SEED = 42
DOCUMENTATION_CHARACTERS = 1_200_000
DEMONSTRATIONS = 4000
PHASES = ("begin", "make", "pt", "sft", "grpo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is left to do; returns the exit code."""
    options = parse(arguments)
    end_on_sigterm()
    try:
        progress = run(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except (CommandFailedError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    write_summary(options.output, progress.seconds, options.seed)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder for all that is made")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of the weights, the data and the sampling")
    parser.add_argument("--max-steps", type=int, help="steps of each of the three trainings, to see it run quickly")
    options = parser.parse_args(arguments)
    if not (EXAMPLES / "grpo" / "train.yaml").is_file():
        parser.error("run this in the folder of the repository: the paths in examples/ are relative to it")
    if options.seed < 0 or (options.max_steps is not None and options.max_steps < 1):
        parser.error("--seed takes a number from 0 on, --max-steps one from 1 on")
    return options


def run(options: argparse.Namespace) -> Progress:
    """Does the phases that are not done yet."""
    files = [*sorted(EXAMPLES.glob("grpo/*.yaml")), EXAMPLES / "pt" / "tiny.yaml", EXAMPLES / "sft" / "tiny.yaml"]
    folder, seed = options.output, options.seed
    progress = open_progress(folder, fingerprint(files, seed, options.max_steps), PHASES)
    if not progress.done("make"):
        with progress.phase("make"):
            make(folder, seed)
    for phase, command in commands(folder, seed, options.max_steps).items():
        if not progress.done(phase):
            with progress.phase(phase):
                surogate(*command)
    return progress


def make(folder: Path, seed: int) -> None:
    """Makes the model's configuration, its tokenizer, and the data of the first two trainings."""
    parameters = model.make_model(folder / "base")
    print(f"a Qwen3 configuration of {parameters:,} parameters, and its tokenizer: {folder / 'base'}")
    characters = data.write_documentation(folder / "text.jsonl", characters=DOCUMENTATION_CHARACTERS, seed=seed)
    print(f"{characters:,} characters of Python's documentation strings: {folder / 'text.jsonl'}")
    orch = EXAMPLES / "grpo" / "orch.yaml"
    number = data.write_demonstrations(folder / "reverse-text.jsonl", orch, count=DEMONSTRATIONS, seed=seed)
    print(f"{number:,} texts and the same backwards: {folder / 'reverse-text.jsonl'}", flush=True)


def commands(folder: Path, seed: int, max_steps: int | None) -> dict[str, list[str]]:
    """Arguments of `surogate` by phase. With the default folder and seed they are the files and nothing else."""
    grpo = [f"--{part}={EXAMPLES / 'grpo' / part}.yaml" for part in ("train", "infer", "orch")]
    return {
        "pt": ["pt", str(EXAMPLES / "pt" / "tiny.yaml"), *_settings("pt", folder, seed, max_steps)],
        "sft": ["sft", str(EXAMPLES / "sft" / "tiny.yaml"), *_settings("sft", folder, seed, max_steps)],
        "grpo": ["grpo", *grpo, *_settings("grpo", folder, seed, max_steps)],
    }


def _settings(phase: str, folder: Path, seed: int, max_steps: int | None) -> list[str]:
    """`--set` for what differs from the files."""
    settings: dict[str, object] = {}
    if folder != DEFAULT_OUTPUT:
        settings |= _folders(phase, folder)
    if seed != DEFAULT_SEED:
        settings |= {"train.train_seed": seed, "orch.seed": seed} if phase == "grpo" else {"train_seed": seed}
    if max_steps is not None:
        # Fewer steps than the files' warm-up would be refused.
        few = {"max_steps": max_steps, "warmup_steps": 0}
        settings |= {"train.max_steps": max_steps, "orch.max_steps": max_steps} if phase == "grpo" else few
    return [f"--set={key}={value}" for key, value in settings.items()]


def _folders(phase: str, folder: Path) -> dict[str, object]:
    here = str(folder) if folder.is_absolute() else f"./{folder}"
    if phase == "pt":
        return {"model": f"{here}/base", "output_dir": f"{here}/pt", "datasets.0.path": f"{here}/text.jsonl"}
    if phase == "sft":
        return {"model": f"{here}/pt", "output_dir": f"{here}/sft", "datasets.0.path": f"{here}/reverse-text.jsonl"}
    models = dict.fromkeys(("train.model", "infer.model", "orch.model.name"), f"{here}/sft")
    return {**models, **dict.fromkeys(("train.output_dir", "orch.output_dir"), f"{here}/grpo")}


if __name__ == "__main__":
    sys.exit(main())

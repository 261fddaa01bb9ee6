"""Which prompts were laid aside, beside each checkpoint: for a later job that goes on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash
from google.protobuf.json_format import MessageToJson

from orchestrator_svc.grpo.configured.difficulty import Pool
from orchestrator_svc.grpo.groups import Prompt
from surogate.errors import ConfigError, DataLossError, Violation
from surogate.structs import from_struct

FOLDER = "buffer"
_KEPT = 20
"""Newest files that stay: those of checkpoints that a job may go back to."""


def save_pools(
    output_dir: Path, step: int, laid_aside: Mapping[str, Pool], prompts: Sequence[Prompt], hash_keys: Sequence[str]
) -> None:
    """Writes `buffer/step-N.json`, whole or not at all."""
    folder = output_dir / FOLDER
    folder.mkdir(exist_ok=True)
    content = {
        pool: [digest(prompt, hash_keys) for prompt in prompts if laid_aside.get(prompt.key) is pool] for pool in Pool
    }
    part = folder / f".step-{step}.part"
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(_file(output_dir, step))
    for old in sorted(folder.glob("step-*.json"), key=lambda path: int(path.stem.removeprefix("step-")))[:-_KEPT]:
        old.unlink()


def load_pools(output_dir: Path, step: int, prompts: Sequence[Prompt], hash_keys: Sequence[str]) -> dict[str, Pool]:
    """The prompts that the job of the checkpoint had laid aside, those of them that this job has; {} without a file.

    Raises:
        DataLossError: The file is not what was written.
    """
    try:
        content = json.loads(_file(output_dir, step).read_text(encoding="utf-8"))
        where = {item: pool for pool in Pool for item in content[pool]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLossError(
            f"{_file(output_dir, step)} cannot be read ({error}): delete it, or set orch.ckpt.skip_buffer"
        ) from error
    found = {prompt.key: where.get(digest(prompt, hash_keys)) for prompt in prompts}
    return {key: pool for key, pool in found.items() if pool is not None}


def digest(prompt: Prompt, hash_keys: Sequence[str]) -> str:
    """Hash of the parts of a prompt's example that tell it from others.

    Raises:
        ConfigError: It has none of the keys.
    """
    example, own = prompt.example, from_struct(prompt.example.fields)
    parts: dict[str, str] = {}
    for key in hash_keys:
        if key == "task":
            parts[key] = prompt.environment
        elif key == "prompt":
            parts[key] = "\n".join(MessageToJson(message, sort_keys=True) for message in example.prompt)
        elif key in ("answer", "id"):
            parts[key] = getattr(example, key)
        elif key in own:
            parts[key] = json.dumps(own[key], sort_keys=True)
    if not parts:
        message = f"the example {prompt.key} has none of {', '.join(hash_keys)}"
        raise ConfigError.of([Violation("orch.buffer.hash_keys", message)])
    return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _file(output_dir: Path, step: int) -> Path:
    return output_dir / FOLDER / f"step-{step}.json"

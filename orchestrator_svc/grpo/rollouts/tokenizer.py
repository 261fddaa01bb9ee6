"""The model's tokenizer and chat template, read from its folder: `tokenizers` and Jinja, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from orchestrator_svc.grpo.rollouts.template import ChatTemplate, as_messages
from surogate.errors import ConfigError, Violation
from surogate.v1 import common_pb2

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

OWN = "auto"
"""The value of `train.template` that leaves the chat template to the model."""


class ChatTokenizer:
    """Conversations to token ids, and completions back to text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    @classmethod
    def load(cls, model: str, template: str = OWN) -> ChatTokenizer:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a model folder or hub name.

        `template` is what `train.template` says: a chat template, or the file of one, in place of the model's own.

        Raises:
            ConfigError: A file is missing or is not what it should be.
        """
        path = _find(model, "tokenizer.json")
        if path is None:
            raise _wrong(f"{model} has no tokenizer.json: save a fast tokenizer beside the model")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise _wrong(f"{path} is not a tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(model, "tokenizer_config.json")
        _as_transformers(tokenizer, config, _read_json(model, "config.json"))
        source = _template_source(model, config) if template == OWN else _given_template(template)
        return cls(
            tokenizer, ChatTemplate(source, _special_tokens(config, _read_json(model, "special_tokens_map.json")))
        )

    def encode_prompts(self, prompts: Sequence[Sequence[common_pb2.ChatMessage]]) -> list[list[int]]:
        """Token ids of each conversation, with the opening of the assistant's turn at the end."""
        texts = [self._template.render(as_messages(prompt)) for prompt in prompts]
        # The template writes the special tokens itself; the post-processor must not add them again.
        return [item.ids for item in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode_answer(
        self,
        prompt: Sequence[common_pb2.ChatMessage],
        turns: Sequence[common_pb2.ChatMessage],
        answer: Sequence[common_pb2.ChatMessage],
        last_id: int,
    ) -> list[int]:
        """Token ids that follow the model's turn, the last of `turns`, up to the opening of its next one.

        The turn itself is not encoded again: `last_id` is the token that it ended with. Where the template closes the
        turn with that very token, as it does for an end-of-turn token, the token is not there twice.

        Raises:
            ConfigError: The chat template cannot be used for several turns.
        """
        text = self._template.continuation(as_messages(prompt), as_messages(turns), as_messages(answer))
        end = self._tokenizer.decode([last_id], skip_special_tokens=False)
        whole = text if text.startswith(end) else end + text  # what a token becomes may depend on the one before
        ids: list[int] = self._tokenizer.encode(whole, add_special_tokens=False).ids
        if ids[:1] == [last_id]:
            return ids[1:]
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, sequences: Sequence[NDArray[np.int32]]) -> list[str]:
        """Text of each completion, special tokens removed."""
        return self._tokenizer.decode_batch([ids.tolist() for ids in sequences], skip_special_tokens=True)


def _template_source(model: str, config: Mapping[str, Any]) -> str:
    path = _find(model, "chat_template.jinja")
    if path is not None:
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {item.get("name"): item.get("template") for item in source}.get("default")
    if not isinstance(source, str):
        raise _wrong(
            f"{model} has no chat template: set train.template to one, or to its file, or put chat_template.jinja "
            "beside tokenizer.json"
        )
    return source


def _given_template(value: str) -> str:
    """The template that a configuration gives: in its own words, or in a file."""
    if "{" in value:
        return value
    path = Path(value).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = f"is neither `auto`, nor a Jinja template, nor a file that can be read ({error})"
        raise ConfigError.of([Violation("train.template", why)]) from error


def _as_transformers(tokenizer: Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Cuts text as transformers does where it does not follow tokenizer.json.

    Its LlamaTokenizer makes itself anew from the vocabulary: a text gets a space in front, and what follows a special
    token none, other than the file may say.
    """
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind != "LlamaTokenizer" or model.get("model_type", "llama") != "llama":
        return
    scheme: Literal["always", "never", "first"] = "always" if config.get("legacy") else "first"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)


def _special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is a string or an object with `content`. The first file that has one wins."""
    found: dict[str, str] = {}
    for config in configs:
        for name in _SPECIAL:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(name, token)
    return found


def _read_json(model: str, name: str) -> dict[str, Any]:
    path = _find(model, name)
    if path is None:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise _wrong(f"{path} must hold an object")
    return data


def _find(model: str, name: str) -> Path | None:
    """The file of a local model folder, or of a hub repository (from the cache, else downloaded)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder / name
        return path if path.is_file() else None
    return _find_on_hub(model, name)


def _find_on_hub(model: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download  # comes with tokenizers; slow to import
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except LocalEntryNotFoundError as error:
        raise _wrong(f"{model} is no folder here, and the hub cannot be reached: {error}") from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise _wrong(f"{model} is neither a folder here nor a model of the hub: {error}") from error


def _wrong(message: str) -> ConfigError:
    return ConfigError.of([Violation("model", message)])

"""What each kind of dataset makes of a row: text, and what of it is learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from surogate.config.data import AutoDataset, ConversationDataset, Dataset, InstructionDataset, TextDataset
from surogate.config.train import TrainConfig
from surogate.errors import InvalidInputError
from trainer_svc.worker.data.chat import ChatRenderer, Message, PlainRenderer, Rendered
from trainer_svc.worker.data.rows import Row, Rows
from trainer_svc.worker.errors import config_error

KnownDataset = TextDataset | InstructionDataset | ConversationDataset
"""A dataset of a definite kind."""

NOTHING = Rendered("", ())
"""What a row without content becomes: nothing to learn, which is counted."""

RenderRow = Callable[[Row], Rendered]
"""What one row becomes. Raises InvalidInputError for a row that is not what its dataset should hold."""

INSTRUCTION_COLUMNS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("prompt", "response"),
)
"""Columns by which `auto` knows instruction data."""

SHAREGPT = {"role": "from", "content": "value"}
"""How the properties of a message are called in data in the form of ShareGPT, which `auto` knows as well."""

MESSAGE_COLUMNS = ("messages", "conversation", "conversations")
"""Columns by which `auto` knows conversations."""

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of the roles that chat templates know."""


class Renderer(Protocol):
    """Renders a conversation."""

    def render(self, messages: list[Message], tools: list[Any] | None = None) -> Rendered:
        """Text of the conversation, and what of it is learned."""
        ...


def row_renderer(
    dataset: KnownDataset, rows: Rows, train: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> RenderRow:
    """Makes the function that renders the rows of `dataset`. Raises ConfigError naming a column that is missing."""
    if isinstance(dataset, TextDataset):
        rows.require("text_field", dataset.text_field)
        return _text_rows(dataset)
    if isinstance(dataset, InstructionDataset):
        for field in ("instruction_field", "output_field", "input_field", "system_prompt_field"):
            rows.require(field, getattr(dataset, field))
        return _instruction_rows(dataset, train, tokenizer)
    for field in ("messages_field", "system_field", "tools_field"):
        rows.require(field, getattr(dataset, field))
    return _conversation_rows(dataset, train, _renderer(train, tokenizer))


def known_kind(dataset: Dataset, rows: Rows) -> KnownDataset:
    """The dataset with its kind told from its columns, where it is `auto`. Raises ConfigError if they do not tell."""
    if not isinstance(dataset, AutoDataset):
        return dataset
    common = dataset.model_dump(exclude={"type"})
    for column in MESSAGE_COLUMNS:
        if column in rows.columns:
            if _is_sharegpt(rows, column):
                common["message_property_mappings"] = SHAREGPT
            return ConversationDataset(type="conversation", messages_field=column, **common)
    for instruction, output in INSTRUCTION_COLUMNS:
        if {instruction, output} <= set(rows.columns):
            further = "input" if "input" in rows.columns else None
            return InstructionDataset(
                type="instruction", instruction_field=instruction, output_field=output, input_field=further, **common
            )
    if "text" in rows.columns:
        return TextDataset(type="text", **common)
    raise rows.error("type", f"auto cannot tell the kind from the columns {', '.join(rows.columns)}; name the kind")


def _is_sharegpt(rows: Rows, column: str) -> bool:
    """Whether the first conversation of all names its properties as ShareGPT does."""
    first = next((row[column] for row in rows if row[column]), None)
    messages = _listed(first)
    message = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(message, Mapping) and set(SHAREGPT.values()) <= set(message) and "role" not in message


def _renderer(train: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    if not train.use_chat_template:
        return PlainRenderer(tokenizer, loss_scale=train.loss_scale, response_prefix=train.response_prefix)
    if tokenizer.chat_template is None:
        raise config_error(
            "template", "is `auto`, and the tokenizer has no chat template; give one, or set use_chat_template: false"
        )
    return ChatRenderer(tokenizer, loss_scale=train.loss_scale, response_prefix=train.response_prefix)


def _text_rows(dataset: TextDataset) -> RenderRow:
    def render(row: Row) -> Rendered:
        return Rendered(_string(row, dataset.text_field), None, special_tokens=True)

    return render


def _instruction_rows(dataset: InstructionDataset, train: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> RenderRow:
    renderer = None if dataset.prompt_format is not None else _renderer(train, tokenizer)

    def render(row: Row) -> Rendered:
        if row[dataset.instruction_field] is None or row[dataset.output_field] is None:
            return NOTHING
        instruction, output = _string(row, dataset.instruction_field), _string(row, dataset.output_field)
        further = _string(row, dataset.input_field) if dataset.input_field else ""
        system = _system_prompt(dataset, row, train)
        if renderer is None:
            return _formatted(dataset, train, tokenizer, system, instruction, further, output)
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": f"{instruction}\n{further}" if further else instruction})
        messages.append({"role": "assistant", "content": output})
        return renderer.render(messages)

    return render


def _system_prompt(dataset: InstructionDataset, row: Row, train: TrainConfig) -> str:
    if dataset.system_prompt_type == "field":
        return str(row.get(dataset.system_prompt_field or "") or "")
    if dataset.system_prompt_type == "fixed":
        return dataset.system_prompt or ""
    return train.system or ""


def _formatted(
    dataset: InstructionDataset,
    train: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    system: str,
    instruction: str,
    further: str,
    output: str,
) -> Rendered:
    """`prompt_format` filled in. What is learned begins at `{output}`, or at the end of a format that has none."""
    chosen = dataset.prompt_format if further else (dataset.prompt_format_no_input or dataset.prompt_format)
    values = {"system": system, "instruction": instruction, "input": further, "output": output}
    texts = [""]
    for literal, name, _, _ in Formatter().parse(chosen or ""):
        texts[-1] += literal
        if name == "output" and len(texts) == 1:
            texts.append("")
        elif name is not None:
            texts[-1] += values[name]
    prompt = texts[0] + (train.response_prefix or "")
    text = prompt + output + "".join(texts[1:]) + (tokenizer.eos_token or "")
    learned = None if train.loss_scale == "all" else ((len(prompt), len(text)),)
    return Rendered(text, learned, special_tokens=True)


def _conversation_rows(dataset: ConversationDataset, train: TrainConfig, renderer: Renderer) -> RenderRow:
    names = dataset.message_property_mappings

    def render(row: Row) -> Rendered:
        raw = _listed(row[dataset.messages_field])
        if raw is None or raw == []:
            return NOTHING
        if not isinstance(raw, list) or not all(isinstance(message, Mapping) for message in raw):
            raise InvalidInputError(f"`{dataset.messages_field}` is not a list of messages")
        messages = [_message(message, names) for message in raw]
        system = (row.get(dataset.system_field) if dataset.system_field else None) or train.system
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": str(system)})
        return renderer.render(messages, _tools(row, dataset))

    return render


def _message(message: Mapping[str, Any], names: Mapping[str, str]) -> Message:
    """A message by the property names that templates use; properties that are null are left out."""
    for needed in ("role", "content"):
        if names[needed] not in message:
            there = ", ".join(map(str, message))
            raise InvalidInputError(
                f"a message has no `{names[needed]}` (it has {there}); set message_property_mappings.{needed}"
            )
    found = {name: message[given] for name, given in names.items() if message.get(given) is not None}
    others = {name: value for name, value in message.items() if name not in names.values() and value is not None}
    role = str(found.get("role"))
    return {**_filled(others), **found, "role": ROLES.get(role, role), "content": _content(found.get("content", ""))}


def _listed(value: Any) -> Any:
    """What a column holds, also where a table of plain text has it as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def _content(value: Any) -> str:
    """A message's text; of a list of parts, as chat services have it, the texts one after the other."""
    if isinstance(value, list):
        return "".join(_part(part) for part in value)
    return _text(value, "a message's content")


def _part(part: Any) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidInputError(f"a message's content has a part of type {kind}; only text can be learnt")


def _filled(value: Any) -> Any:
    """Without the properties that are null: tables fill in those that only some of the rows have."""
    if isinstance(value, Mapping):
        return {name: _filled(item) for name, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _tools(row: Row, dataset: ConversationDataset) -> list[Any] | None:
    tools = row.get(dataset.tools_field) if dataset.tools_field else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise InvalidInputError(f"`{dataset.tools_field}` is not valid JSON: {error}") from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InvalidInputError(f"`{dataset.tools_field}` is not a list of tool definitions")
    return list(_filled(tools)) if tools else None


def _string(row: Row, column: str) -> str:
    """The text in a column; that of an empty field is empty."""
    value = row[column]
    return "" if value is None else _text(value, f"column `{column}`")


def _text(value: Any, what: str) -> str:
    """A text, or a number as it is written."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise InvalidInputError(f"{what} holds {type(value).__name__}, not text")

"""Keys of train.yaml: datasets and how their rows become tokens."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from surogate.config.base import ConfigModel, Float, Text, Tokens, fail, problem, refuse

MAX_ROWS = 10**12
PLACEHOLDERS = frozenset({"system", "instruction", "input", "output"})


class DatasetBase(ConfigModel):
    """What every kind of dataset has."""

    path: Text
    """File or folder (JSONL, JSON, parquet, CSV, for text also plain text), or the name of a dataset on the hub."""
    subset: Text | None = None
    """Configuration of a dataset on the hub, or folder of that name in a local one. null = its default."""
    split: Text = "train"
    """Split to use, where there are several; `train[:1000]` and `train[5%:10%]` take a part of it."""
    samples: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = None
    """Use the first so many rows, 1 to 10¹². null = all."""


class AutoDataset(DatasetBase):
    """A dataset whose kind is told from its columns."""

    type: Literal["auto"]
    """Kind of data."""


class TextDataset(DatasetBase):
    """Raw text, every token of which is learnt."""

    type: Literal["text"]
    """Kind of data."""
    text_field: Text = "text"
    """Column of the text."""


def _format(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parts = [part for part in Formatter().parse(value) if part[1] is not None]
        names = {str(name) for _, name, _, _ in parts}
    except ValueError as error:
        raise fail(f"is not a format string: {error}") from error
    if names - PLACEHOLDERS:
        raise fail(f"has unknown placeholders {sorted(names - PLACEHOLDERS)}: use {sorted(PLACEHOLDERS)}")
    if any(how or conversion for _, _, how, conversion in parts):
        raise fail("has a placeholder with a format (`:`) or a conversion (`!`): use {instruction} and the like alone")
    if "instruction" not in names:
        raise fail("must contain {instruction}")
    return value


PromptFormat = Annotated[str | None, BeforeValidator(_format)]


class InstructionDataset(DatasetBase):
    """An instruction and its answer per row."""

    type: Literal["instruction"]
    """Kind of data."""
    instruction_field: Text
    """Column of the instruction."""
    output_field: Text
    """Column of the answer, which is what is learnt."""
    input_field: Text | None = None
    """Column of further input. null = none."""
    system_prompt_type: Literal["field", "fixed"] | None = None
    """Where the system prompt is from: the column system_prompt_field, or system_prompt for all rows. null = none."""
    system_prompt_field: Text | None = None
    """Column of the system prompt; with system_prompt_type field."""
    system_prompt: str | None = None
    """System prompt of all rows; with system_prompt_type fixed."""
    prompt_format: PromptFormat = None
    """Format of the prompt with {system}, {instruction}, {input}, {output} in place of the chat template. null =
    chat template.
    """
    prompt_format_no_input: PromptFormat = None
    """The same for rows without input. null = prompt_format."""

    @model_validator(mode="after")
    def _system_prompt_is_complete(self) -> Self:
        needs = {"field": "system_prompt_field", "fixed": "system_prompt"}
        needed = needs.get(self.system_prompt_type or "")
        problems = []
        if self.prompt_format_no_input is not None and self.prompt_format is None:
            problems.append(problem("prompt_format_no_input", "needs prompt_format, which rows with input would take"))
        if needed and getattr(self, needed) is None:
            problems.append(problem(needed, f"is required with system_prompt_type: {self.system_prompt_type}"))
        for kind, name in needs.items():
            if getattr(self, name) is not None and name != needed:
                problems.append(problem(name, f"needs system_prompt_type: {kind}"))
        refuse("dataset", problems)
        return self


def _mappings(value: Any) -> Any:
    return {"role": "role", "content": "content", **value} if isinstance(value, dict) else value


MessageMappings = Annotated[dict[str, Text], BeforeValidator(_mappings)]


class ConversationDataset(DatasetBase):
    """A list of messages per row."""

    type: Literal["conversation"]
    """Kind of data."""
    messages_field: Text = "messages"
    """Column of the messages."""
    system_field: Text | None = None
    """Column of the system prompt. null = none but what the messages have."""
    tools_field: Text | None = None
    """Column of tool definitions, for the chat template. null = none."""
    message_property_mappings: MessageMappings = Field({"role": "role", "content": "content"})
    """What a message's properties are called in the data, by the names that chat templates use."""


Dataset = Annotated[TextDataset | InstructionDataset | ConversationDataset | AutoDataset, Field(discriminator="type")]
"""One entry of `datasets`, by its `type`."""


class DataKeys(ConfigModel):
    """What is learnt from, and what is held out."""

    datasets: list[Dataset] | None = None
    """Training data. PT takes type text, SFT instruction and conversation, both `auto`. Empty in GRPO, whose prompts
    come from orch.yaml.
    """
    validation_datasets: list[Dataset] | None = None
    """Held-out data. null = validation_split_ratio of the training data."""
    validation_split_ratio: Annotated[Float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the training data that is held out where validation_datasets is not set, 0 to below 1. 0 = no
    evaluation.
    """


class ChatKeys(ConfigModel):
    """How conversations become tokens, and which of them are learnt."""

    use_chat_template: bool = True
    """Put conversations and instructions through the chat template; false joins their texts."""
    template: Text = "auto"
    """Chat template, of GRPO's prompts too: `auto` = the tokenizer's own; else a Jinja template, or the path of one."""
    system: str | None = None
    """System prompt for conversations that have none. null = what the template does."""
    max_length: Tokens | None = None
    """Longest conversation in tokens, 1 to 16,777,216. null = sequence_len."""
    truncation_strategy: Literal["delete", "left", "right", "split"] = "delete"
    """What is done with longer ones: left out, cut at the start, cut at the end, or split into several samples."""
    padding_side: Literal["left", "right"] = "right"
    """Side on which sequences are padded to pad_to_multiple_of. It changes no loss."""
    loss_scale: Literal["default", "last_round", "all"] = "default"
    """Tokens that are learnt: the assistant's, those of its last turn, or all."""
    response_prefix: str | None = None
    """Text that every answer is made to start with, in front of what is learnt. null = none."""

    @model_validator(mode="after")
    def _length_fits(self) -> Self:
        limit = getattr(self, "sequence_len", None)
        if self.max_length is not None and limit is not None and self.max_length > limit:
            refuse("train", [problem("max_length", f"is {self.max_length}, more than sequence_len ({limit})")])
        return self

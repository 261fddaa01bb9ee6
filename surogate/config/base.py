"""What all configuration models share: strict types, and keys that are unknown, renamed, ignored or not yet there.

Numbers may come back from a `google.protobuf.Struct`, where every number is a double: an integral float is an integer.
Nothing else is coerced, except that a field of type `Float` takes a string such as "2e-4", which many YAML parsers
make of an exponent without a dot.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from surogate.config import folders
from surogate.errors import Violation
from surogate.urls import is_url

NOT_YET = "known, not supported yet"
"""What is said of a key that Surogate has and this version does not."""
NO_EFFECT = "has no effect here: it tunes an engine that this is not"
"""What is said of a key that is accepted and means nothing."""
EMPTY = "is empty: give a value, or remove the key to use the default"
"""What is said of a key that is there without a value."""
LONGEST_SHOWN = 200
"""Characters of a value that a message shows."""
MAX_SEED = 2**32 - 1
"""Largest random seed, unsigned 32 bits: what every library takes."""
MAX_NUMBER = 10**9
"""Largest number of steps, rows, seconds and the like, where a key has no bound of its own: 32 bits hold it."""
MAX_TOKENS = 2**24
"""Longest sequence, in tokens: several times that of any model."""
MAX_DEVICES = 1024
"""Most GPUs of a node or a replica, most nodes, most replicas."""
MAX_RANK = 2**16
"""Highest rank of an adapter: that of the widest matrices."""

T = TypeVar("T")


def number_of(value: object) -> object:
    """Makes a number of a string that spells one, such as "2e-4"; leaves everything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def spelled(spellings: Mapping[str, str]) -> BeforeValidator:
    """A validator that maps other spellings of a value, lower-cased, to the one that is used here."""

    def normalise(value: object) -> object:
        return spellings.get(value.lower(), value) if isinstance(value, str) else value

    return BeforeValidator(normalise)


Float = Annotated[float, BeforeValidator(number_of)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Size = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
"""A length in tokens."""
Devices = Annotated[int, Field(ge=0, le=MAX_DEVICES)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
"""Rank of an adapter, or its scale."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Text = Annotated[str, Field(min_length=1)]


def _on_disk(value: str) -> str:
    if is_url(value):
        raise fail(
            f"must be on the disk of the machine that runs the job, not {shown(value)}: an object store keeps "
            "checkpoints and the final model, named by checkpoint_dir of train.yaml"
        )
    return value


def _checked(reason: Callable[[str], str]) -> Callable[[str], str]:
    """A validator that refuses a path for a reason."""

    def validate(value: str) -> str:
        if not is_url(value) and (why := reason(value)):
            raise fail(why)
        return value

    return validate


LocalFile = Annotated[Text, AfterValidator(_on_disk), AfterValidator(_checked(folders.file_refusal))]
"""What is written to line by line, which no object store can do."""
OutputFolder = Annotated[Text, AfterValidator(_checked(folders.refusal))]
"""A folder to write into, or a URL."""
LocalFolder = Annotated[OutputFolder, AfterValidator(_on_disk)]
"""A folder of this machine to write into."""


def problem(field: str | tuple[str | int, ...], message: str, value: object = None) -> InitErrorDetails:
    """One error about a field, with a message for people."""
    loc = (field,) if isinstance(field, str) else field
    return InitErrorDetails(type=fail(message), loc=loc, input=value)


def fail(message: str) -> PydanticCustomError:
    """The error that a validator of one field raises."""
    text: Any = message  # typed as a literal string, which is for translators
    return PydanticCustomError("surogate", text)


def refuse(title: str, problems: Iterable[InitErrorDetails]) -> None:
    """Raises the problems, if there are any."""
    found = list(problems)
    if found:
        raise ValidationError.from_exception_data(title, found)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """A hint such as "; did you mean `learning_rate`?", empty if nothing is near."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean `{found[0]}`?" if found else ""


def integral(value: Any) -> Any:
    """Makes integers of integral floats, throughout lists and mappings."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if isinstance(value, list):
        return [integral(item) for item in value]
    if isinstance(value, dict):
        return {key: integral(item) for key, item in value.items()}
    return value


class ConfigModel(BaseModel):
    """A block of configuration. Immutable; `model_copy(update=…)` makes a changed one."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    block: ClassVar[str] = ""
    """Where the block is in its file, with a dot behind it; for warnings."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Other names of fields."""
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Keys that are accepted with a warning."""
    not_yet: ClassVar[frozenset[str]] = frozenset()
    """Keys that are known and have no field yet."""

    @model_validator(mode="wrap")
    @classmethod
    def _screen(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        values, problems = cls._screened(data, info.context or {})
        try:
            model = handler(values)
        except ValidationError as error:
            problems += [_kept(item) for item in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, problems) from error
        refuse(cls.__name__, problems)
        return model

    @classmethod
    def _screened(
        cls, data: dict[Any, Any], context: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """The values to validate, and what is wrong with the keys."""
        values: dict[str, Any] = {}
        problems: list[InitErrorDetails] = []
        for given, raw in data.items():
            key, value = cls.renamed.get(given, given), integral(raw)
            wrong = cls._wrong_key(given, key, value)
            if wrong is None and key in values and values[key] != value:
                wrong = f"is another name of `{key}`, which is set to another value: remove one"
            if wrong is not None:
                problems.append(problem(str(given), wrong, value))
            elif key in cls.model_fields:
                values[key] = value
            elif key in cls.without_effect:
                warn(context, f"{cls.block}{given}", NO_EFFECT)
        return values, problems

    @classmethod
    def _wrong_key(cls, given: str, key: str, value: object) -> str | None:
        """Why a key cannot be taken with that value; None if it can."""
        known = key in cls.model_fields or key in cls.without_effect
        return None if known else cls._unknown_key(str(given), value)

    @classmethod
    def _unknown_key(cls, key: str, value: object) -> str | None:
        """What to say of a key that is not a field; None to drop it in silence."""
        del value
        if key in cls.not_yet:
            return NOT_YET
        return "unknown key" + nearest(key, [*cls.model_fields, *cls.renamed, *cls.without_effect])


def _kept(error: Any) -> InitErrorDetails:
    """An error of pydantic, to be raised again in another one."""
    if error["type"] == "surogate":
        kind: Any = PydanticCustomError("surogate", error["msg"])
    else:
        kind = PydanticCustomError(error["type"], error["msg"], error.get("ctx"))
    return InitErrorDetails(type=kind, loc=error["loc"], input=error["input"])


def warn(context: Mapping[str, Any] | None, key: str, message: str) -> None:
    """Notes a warning where the caller of the validation asked for them (`context={"warnings": []}`)."""
    warnings: list[Violation] | None = (context or {}).get("warnings")
    warning = Violation(key, message)
    if warnings is not None and warning not in warnings:
        warnings.append(warning)


def shown(value: object) -> str:
    """A value as YAML shows it; of a long one, the beginning."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def one_of(check: Callable[[object], bool], message: str) -> BeforeValidator:
    """A validator that refuses with one message what a union of types would refuse with several."""

    def validate(value: object) -> object:
        if value is None:
            raise fail(EMPTY)
        if not check(value):
            raise fail(f"{message}, got {shown(value)}")
        return value

    return BeforeValidator(validate)

"""Settings that every service has. Flags come before the environment, the environment before `--settings FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from surogate.errors import ConfigError, Violation

MIB = 1 << 20


class ServiceSettings(BaseSettings):
    """Where a service listens, how it logs, whom it lets in, and how much it takes at once.

    A service's own settings derive from this and set `env_prefix` (`SUROGATE_TRAINER_`). Every field is a flag in
    kebab case (`--max-message-bytes`), a variable (`SUROGATE_TRAINER_MAX_MESSAGE_BYTES`) and a key of the file.
    """

    model_config = SettingsConfigDict(
        env_prefix="SUROGATE_",
        extra="forbid",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        use_attribute_docstrings=True,
        frozen=True,
    )

    settings: Path | None = None
    """YAML or JSON file with any of these settings, by their names with underscores."""

    listen: str = "127.0.0.1:0"
    """Address of the gRPC server, HOST:PORT; port 0 takes a free one."""

    metrics_listen: str = "127.0.0.1:0"
    """Address of the Prometheus metrics (HTTP), HOST:PORT; port 0 takes a free one; empty turns them off."""

    health_listen: str = ""
    """Address of a second gRPC server that has the health service alone, without TLS: for probes that know no TLS, as
    those of Kubernetes; empty is none."""

    announce_file: Path | None = None
    """File to write {"address", "metrics_address", "pid"} to as JSON, once the server listens."""

    log_format: Literal["auto", "text", "json"] = "auto"
    """How log lines look: auto is text on a terminal and JSON otherwise."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write."""

    tls_cert: Path | None = None
    """Server certificate chain (PEM); turns TLS on. Renewed files are taken up without a restart."""

    tls_key: Path | None = None
    """Private key of the certificate (PEM)."""

    tls_client_ca: Path | None = None
    """Certificate authority (PEM) that clients' certificates must come from; turns mTLS on."""

    token_file: Path | None = None
    """File with the bearer tokens that are valid, one a line, each perhaps with a name before it: `NAME TOKEN`. Read
    again when it changes."""

    token_env: str | None = None
    """Name of an environment variable with the bearer tokens that are valid, separated by commas."""

    max_message_bytes: int = Field(64 * MIB, ge=MIB, le=2**31 - 1)
    """Largest message taken or sent, in bytes."""

    max_concurrent_rpcs: int = Field(1024, ge=1, le=1_000_000)
    """Calls handled at once, three of four of them streams that are followed without end (WatchJob, ReadLogs); more
    are refused with RESOURCE_EXHAUSTED. Health checks do not count."""

    default_deadline: float = Field(60.0, gt=0)
    """Seconds given to a call that comes without a deadline, unless its method has a default of its own."""

    max_connection_age: float | None = Field(None, gt=0)
    """Seconds after which a client is asked to connect anew, so that load balancers can spread it; unset is never."""

    drain_seconds: float = Field(30.0, ge=0)
    """Seconds that calls in flight may take to finish after SIGTERM."""

    drain_delay: float = Field(0.0, ge=0)
    """Seconds between reporting NOT_SERVING and refusing calls after SIGTERM, for load balancers to notice."""

    @field_validator("listen", "metrics_listen", "health_listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if value and not (colon and host and port.isdigit() and int(port) < 65536):
            raise ValueError("must be HOST:PORT, for example 127.0.0.1:50051")
        return value

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServiceSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if not self.listen:
            raise ValueError("listen must not be empty")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _FileSource(settings_cls)


S = TypeVar("S", bound=ServiceSettings)


def parse_settings(cls: type[S], argv: Sequence[str] | None = None, *, prog: str | None = None) -> S:
    """The settings from `argv` (the process's own without it), the environment and the file.

    Raises ConfigError whose violations name the flags, and SystemExit for --help and for flags that argparse refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        flags: CliSettingsSource[Any] = CliSettingsSource(
            cls, cli_prog_name=prog, cli_parse_args=arguments, formatter_class=_HelpFormatter
        )
        return cls(_cli_settings_source=flags)
    except ValidationError as error:
        raise ConfigError.of([_violation(item) for item in error.errors(include_url=False)]) from error
    except SettingsError as error:
        raise ConfigError.of([Violation("", str(error))]) from error


class _FileSource(PydanticBaseSettingsSource):
    """Values of the `--settings` file, which the sources before this one have named."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("values come from __call__, all at once")

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("settings")
        return read_settings_file(Path(path)) if path else {}


def read_settings_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, keys with underscores. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError.of([Violation("settings", f"cannot read {path}: {error.strerror}")]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError.of([Violation("settings", f"{path} is not YAML: {' '.join(str(error).split())}")]) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError.of([Violation("settings", f"{path} must hold a mapping of settings")])
    return {str(key).replace("-", "_"): value for key, value in data.items()}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wide enough for the flags, and the class docstring as written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _violation(item: Any) -> Violation:
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "is not a setting of this service; see --help"
    return Violation(".".join(map(str, item["loc"])), message)

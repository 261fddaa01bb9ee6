"""How a client shows who it is, and whom it trusts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from surogate.errors import ConfigError, Violation
from surogate.rpc.auth import TokenSource, check_pair, file_stamp


@dataclass(frozen=True)
class ClientSecurity:
    """A client's token and TLS files.

    Any of the TLS files, or `tls`, turns TLS on; without `ca_file` the system's authorities are trusted. `token_file`
    is read again when it changes and comes before `token`. `server_name` is the name to expect in the certificate.
    """

    token: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    tls: bool = False
    token_file: Path | None = None
    server_name: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> ClientSecurity:
        """Reads SUROGATE_TOKEN (the first of several), SUROGATE_TOKEN_FILE, SUROGATE_TLS (1), SUROGATE_TLS_CA,
        SUROGATE_TLS_CERT, SUROGATE_TLS_KEY and SUROGATE_TLS_SERVER_NAME."""
        env = os.environ if environ is None else environ

        def path(name: str) -> Path | None:
            return Path(env[name]) if env.get(name) else None

        return cls(
            token=env.get("SUROGATE_TOKEN", "").split(",")[0].strip() or None,
            ca_file=path("SUROGATE_TLS_CA"),
            cert_file=path("SUROGATE_TLS_CERT"),
            key_file=path("SUROGATE_TLS_KEY"),
            tls=env.get("SUROGATE_TLS", "").lower() in {"1", "true", "yes"},
            token_file=path("SUROGATE_TOKEN_FILE"),
            server_name=env.get("SUROGATE_TLS_SERVER_NAME") or None,
        )

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls or any((self.ca_file, self.cert_file, self.key_file))

    def credentials(self) -> grpc.ChannelCredentials:
        """TLS credentials. Raises ConfigError naming the file that cannot be read."""
        return grpc.ssl_channel_credentials(
            _read(self.ca_file, "SUROGATE_TLS_CA"),
            _read(self.key_file, "SUROGATE_TLS_KEY"),
            _read(self.cert_file, "SUROGATE_TLS_CERT"),
        )

    def stamp(self) -> tuple[tuple[int, int, int], ...] | None:
        """Changes whenever one of the TLS files does; None while one cannot be looked at."""
        try:
            return tuple(file_stamp(file) for file in (self.ca_file, self.cert_file, self.key_file) if file)
        except OSError:
            return None

    def check(self) -> None:
        """Raises ConfigError if the client's certificate and key do not belong together: one may be yet to come."""
        if self.cert_file and self.key_file:
            check_pair(self.cert_file, self.key_file, None)

    @property
    def has_token(self) -> bool:
        """Whether calls carry a token."""
        return bool(self.token or self.token_file)

    def token_source(self) -> Callable[[], str | None]:
        """A function that returns the token to send now: the file's first, read again when it changes, else `token`."""
        source = TokenSource(self.token_file)

        def current() -> str | None:
            return next((token.secret for token in source.tokens()), self.token)

        return current


def authorization(token: str | None) -> tuple[tuple[str, str], ...]:
    """The call metadata that carries a token. Raises ConfigError for one that no header can carry."""
    if token and not all("!" <= letter <= "~" for letter in token):
        why = "the token has characters other than printable ASCII ones; is it a token?"
        raise ConfigError.of([Violation("SUROGATE_TOKEN", why)])
    return (("authorization", f"Bearer {token}"),) if token else ()


def _read(file: Path | None, name: str) -> bytes | None:
    if file is None:
        return None
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError.of([Violation(name, f"cannot read {file}: {error.strerror}")]) from error
    if b"-----BEGIN " not in content:
        raise ConfigError.of([Violation(name, f"{file} is not PEM: it has no line that begins with -----BEGIN")])
    return content

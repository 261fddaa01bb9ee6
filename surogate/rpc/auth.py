"""Bearer tokens (several valid at once, so that they can be rotated) and TLS, from files and the environment."""

from __future__ import annotations

import hmac
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc

from surogate.errors import ConfigError, UnauthenticatedError, Violation
from surogate.telemetry.log import get_logger

_SCHEME = "bearer "
_log = get_logger("rpc")


@dataclass(frozen=True)
class Token:
    """A bearer token, and the name of who has it; empty where nobody in particular does."""

    secret: str = field(repr=False)
    name: str = ""


class TokenSource:
    """The valid tokens: one a line in a file that is read again whenever it changes, or comma-separated in a variable.

    A line of the file may have a name before its token, `NAME TOKEN`: who calls with it is known by that name. With
    neither file nor variable `tokens()` is empty. Raises ConfigError if what is named holds no token.
    """

    def __init__(self, file: Path | None = None, env: str | None = None) -> None:
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._env_tokens = _from_env(env) if env else ()
        self._tokens = self._env_tokens + (self._read(file) if file else ())

    def tokens(self) -> tuple[Token, ...]:
        """The tokens that are valid now."""
        if self._file is not None:
            self._reload(self._file)
        return self._tokens

    def _reload(self, file: Path) -> None:
        try:
            if file_stamp(file) != self._stamp:
                self._tokens = self._env_tokens + self._read(file)
        except (OSError, ConfigError) as error:
            # A rotation may be caught half-way; the tokens that were valid stay valid until the file can be read.
            _log.warning("token file cannot be read; the tokens read before stay valid", error=str(error))

    def _read(self, file: Path) -> tuple[Token, ...]:
        try:
            stamp, text = file_stamp(file), file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError.of([Violation("token_file", f"cannot read {file}: {error.strerror}")]) from error
        except UnicodeDecodeError as error:
            raise ConfigError.of([Violation("token_file", f"{file} is not text")]) from error
        found = tuple(_token(line.split(), file, number) for number, line in _lines(text))
        if not found:
            raise ConfigError.of([Violation("token_file", f"{file} holds no token; write one a line")])
        self._stamp = stamp
        return found


def check_token(authorization: str | None, tokens: tuple[Token, ...]) -> str:
    """The name of who has the token; empty where it has none, or no token is asked for.

    Raises UnauthenticatedError unless `authorization` is `Bearer <one of tokens>`.
    """
    if not tokens:
        return ""
    if authorization is None or not authorization[: len(_SCHEME)].lower() == _SCHEME:
        raise UnauthenticatedError(
            "this service asks for a bearer token: set SUROGATE_TOKEN, or send the metadata `authorization: Bearer …`",
            reason="TOKEN_MISSING",
        )
    given = authorization[len(_SCHEME) :].strip().encode()
    # All are compared, each in constant time, so that timing tells nothing about any of them.
    matches = [hmac.compare_digest(given, token.secret.encode()) for token in tokens]
    if True not in matches:
        raise UnauthenticatedError("the bearer token is not valid here", reason="TOKEN_INVALID")
    return tokens[matches.index(True)].name


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """TLS credentials that follow the files when certificates are renewed; mTLS if `client_ca` is given.

    Raises ConfigError if a file cannot be read, is not PEM, or key and certificate do not belong together.
    """
    check_pair(cert, key, client_ca)

    def configuration() -> grpc.ServerCertificateConfiguration:
        chain = [(key.read_bytes(), cert.read_bytes())]
        return grpc.ssl_server_certificate_configuration(chain, client_ca.read_bytes() if client_ca else None)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        try:
            check_pair(cert, key, client_ca)
            return configuration()
        except (OSError, ConfigError) as error:
            _log.warning("renewed TLS files cannot be used; the certificate loaded before stays", error=str(error))
            return None

    files = [cert, key, *([client_ca] if client_ca else [])]
    # The stubs do not say that the fetcher may return None: keep the configuration.
    fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], _when_changed(files, renewed))
    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, client_ca is not None)


def _when_changed(
    files: list[Path], renewed: Callable[[], grpc.ServerCertificateConfiguration | None]
) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """Called at every handshake: the new configuration if a file changed since the last look, else None."""
    seen = [file_stamp(file) for file in files]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            now = [file_stamp(file) for file in files]
        except OSError:
            return None
        if now == seen:
            return None
        configuration = renewed()
        if configuration is not None:
            seen = now
        return configuration

    return fetch


def check_pair(cert: Path, key: Path, client_ca: Path | None) -> None:
    """Raises ConfigError if they are no certificate and its key, or `client_ca` is no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError.of([Violation("tls_cert", f"cannot use {cert} with {key}: {_why(error)}")]) from error
    if client_ca is None:
        return
    try:
        context.load_verify_locations(cafile=client_ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError.of([Violation("tls_client_ca", f"cannot use {client_ca}: {_why(error)}")]) from error


def _why(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return str(reason).replace("_", " ").lower()


def file_stamp(file: Path) -> tuple[int, int, int]:
    """Changes whenever the file does. Raises OSError."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _token(words: list[str], file: Path, number: int) -> Token:
    if len(words) > 2:
        why = f"{file}, line {number}: write a token, or a name and its token"
        raise ConfigError.of([Violation("token_file", why)])
    return Token(words[-1], words[0] if len(words) == 2 else "")


def _from_env(name: str) -> tuple[Token, ...]:
    found = tuple(Token(token.strip()) for token in os.environ.get(name, "").split(",") if token.strip())
    if not found:
        raise ConfigError.of([Violation("token_env", f"the environment variable {name} holds no token")])
    return found

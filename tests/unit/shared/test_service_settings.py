"""Settings of a service: flags before the environment before the file, and errors that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_settings import SettingsConfigDict

from surogate.config.service import ServiceSettings, parse_settings
from surogate.errors import ConfigError


class Toy(ServiceSettings):
    """A service."""

    model_config = SettingsConfigDict(env_prefix="SUROGATE_TOY_")

    level_of_detail: int = 1
    """How much detail."""


def test_flags_come_before_the_environment_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("level_of_detail: 2\ndrain-seconds: 3\nlog_level: error\n")
    monkeypatch.setenv("SUROGATE_TOY_LOG_LEVEL", "debug")
    monkeypatch.setenv("SUROGATE_TOY_LEVEL_OF_DETAIL", "4")
    found = parse_settings(Toy, ["--settings", str(file), "--level-of-detail", "5"])
    assert (found.level_of_detail, found.log_level, found.drain_seconds) == (5, "debug", 3.0)


def test_the_file_may_be_json_and_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"level_of_detail": 2}')
    monkeypatch.setenv("SUROGATE_TOY_SETTINGS", str(file))
    assert parse_settings(Toy, []).level_of_detail == 2


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--level-of-detail", "much"], "level_of_detail"),
        (["--listen", "localhost"], "listen"),
        (["--listen", "localhost:99999"], "listen"),
        (["--max-message-bytes", "5"], "max_message_bytes"),
        (["--drain-seconds", "-1"], "drain_seconds"),
        (["--tls-cert", "x.pem"], ""),
        (["--tls-client-ca", "x.pem"], ""),
    ],
)
def test_a_wrong_value_is_named(arguments: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(Toy, arguments)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(("text", "message"), [("levl: 1", "levl"), ("- a", "mapping"), ("a: [", "not YAML")])
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_settings(Toy, ["--settings", str(file)])


def test_an_unknown_flag_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(Toy, ["--levl", "1"])
    assert caught.value.code == 2
    assert "--levl" in capsys.readouterr().err

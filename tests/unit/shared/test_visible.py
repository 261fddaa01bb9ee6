"""What models and services wrote, as people are shown it."""

from __future__ import annotations

import sys

import pytest

from surogate.cli.console import write_foreign
from surogate.cli.exits import report
from surogate.cli.running.words import notice
from surogate.errors import InternalError
from surogate.v1 import job_pb2
from surogate.visible import visible

ATTACK = "\x1b]0;owned\x07\x1b[2J\r\u202egnp.exe\x9b31m"


@pytest.mark.parametrize("text", ["two\nlines\tand a tab", "日本\u3000語", "👩\u200d👩\u200d👧", "e\u0301"])
def test_ordinary_text_stays(text: str) -> None:
    assert visible(text) == text


def test_what_a_terminal_obeys_is_spelled_out() -> None:
    assert visible(ATTACK) == r"\x1b]0;owned\x07\x1b[2J\r\u202egnp.exe\x9b31m"
    assert visible("\ud800") == r"\ud800"


@pytest.mark.parametrize(("terminal", "written"), [(True, visible(ATTACK)), (False, ATTACK)])
def test_what_a_model_wrote_is_spelled_out_to_a_terminal_alone(
    terminal: bool, written: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    write_foreign(ATTACK)
    assert capsys.readouterr().out == written


def test_events_and_errors_are_shown_so(capsys: pytest.CaptureFixture[str]) -> None:
    event = job_pb2.JobEvent(notice=job_pb2.Notice(component="reward", text=ATTACK))
    assert "\x1b" not in str(notice(event))
    report(InternalError(f"one\ntwo {ATTACK}"))
    said = capsys.readouterr().err
    assert said.startswith("error: one\ntwo ") and not any(letter in said for letter in "\x1b\x9b\u202e")

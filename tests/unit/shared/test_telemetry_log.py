"""Log lines: JSON or text, the same form for every library, with job, step and policy version on each."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from surogate.telemetry import log


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    out = io.StringIO()
    log.configure("auto", "info", stream=out)
    yield lambda: [json.loads(line) for line in out.getvalue().splitlines()]
    structlog.contextvars.clear_contextvars()
    log.bind_process(job=None, step=None, policy_version=None)
    log.configure("text", "warning")


def test_off_a_terminal_lines_are_json_with_the_context(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.bind_process(job="j1")
    with log.bound(step=3, policy_version=2):
        log.get_logger("trainer").info("stepped", loss=0.5)
    (line,) = lines()
    assert line["timestamp"].endswith("Z")
    wanted = {"component": "trainer", "event": "stepped", "loss": 0.5, "job": "j1", "step": 3, "policy_version": 2}
    assert {key: line[key] for key in wanted} == wanted


def test_the_standard_library_goes_the_same_way(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.bind(job="j2")
    logging.getLogger("vllm.engine").warning("cache is %s", "full")
    (line,) = lines()
    wanted = {"component": "vllm.engine", "event": "cache is full", "level": "warning", "job": "j2", "step": None}
    assert {key: line[key] for key in wanted} == wanted


def test_an_exception_is_a_field_of_its_line(lines: Callable[[], list[dict[str, Any]]]) -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        log.get_logger("x").error("failed", exc_info=error)
    (line,) = lines()
    assert "ValueError: boom" in line["exception"]


def test_the_level_counts_for_all(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log.get_logger("x").debug("not said")
    logging.getLogger("y").debug("not said")
    assert lines() == []


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    log.configure("text", "info", stream=out)
    log.get_logger("reward").info("scored", groups=4)
    assert "scored" in out.getvalue()
    assert "groups=4" in out.getvalue()


def test_an_inner_context_ends_with_its_block() -> None:
    with log.bound(job="a", step=1):
        with log.bound(step=2):
            assert log.current_context() == {"job": "a", "step": 2}
        assert log.current_context() == {"job": "a", "step": 1}
    assert log.current_context() == {}


def test_text_of_others_forges_no_line_and_steers_no_terminal() -> None:
    out = io.StringIO()
    log.configure("text", "info", stream=out)
    try:
        said = "no answer\n2026-01-01T00:00:00Z [info     ] all is well\x1b[2J\r"
        log.get_logger("reward").warning("the service said", error=said)
        log.get_logger("reward").warning(said)
    finally:
        log.configure("json", "warning")
    lines = out.getvalue().splitlines()
    assert all("all is well" not in line or line.startswith("    ") or "the service said" in line for line in lines)
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


@pytest.mark.parametrize("as_json", [True, False])
def test_an_exception_shows_no_local_variables_and_steers_no_terminal(as_json: bool) -> None:
    out = io.StringIO()
    log.configure("json" if as_json else "text", "info", stream=out)
    key = "-".join(["s", "k", "secret"])
    try:
        raise ValueError("\x1b]0;owned\x07")
    except ValueError:
        log.get_logger("reward").warning("scoring failed", exc_info=True)
    log.configure("text", "warning")
    said = out.getvalue()
    assert "Traceback" in said and "ValueError" in said and "owned" in said
    assert key not in said and "\x1b" not in said and "\x07" not in said


def test_secrets_inside_of_values_are_left_out() -> None:
    out = io.StringIO()
    log.configure("json", "info", stream=out)
    try:
        log.get_logger("x").info("called", headers={"Authorization": "Bearer s3cret", "n": 1})
    finally:
        log.configure("json", "warning")
    assert "s3cret" not in out.getvalue()

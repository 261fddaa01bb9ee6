"""The rollout store: rows by step, a bound on its size, and the commands that read it."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from surogate.cli.main import app
from surogate.errors import DataLossError, NotFoundError
from surogate.rollouts import make_room, read_steps, step_files, write_step


def row(step: int, number: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "rollout_id": f"{step:09d}-{number}",
        "group_id": f"{step:09d}",
        "environment": "reverse-text",
        "example_id": "7",
        "prompt": json.dumps([{"role": "user", "content": "abc"}]),
        "answer": "cba",
        "fields": "{}",
        "completion": "cb",
        "reward": number / 10,
        "components": [("exact", 0.0)],
        "fate": "trained",
        "finish_reason": "stop",
        "temperature": 1.0,
        "oldest_version": step - 1,
        "newest_version": step - 1,
        "scored_by": "built-in",
        "prompt_ids": [1, 2],
        "token_ids": [3, 4],
        "logprobs": [-0.5, -0.25],
        "time": datetime.now(UTC),
        **changes,
    }


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path: Path) -> None:
    attack = "\x1b]0;owned\x07\x1b[2J\u202e[red]"
    shown_as = r"\x1b]0;owned\x07\x1b[2J\u202e[red]"
    prompt = json.dumps([{"role": attack, "content": attack}])
    write_step(tmp_path, 1, [row(1, 0, completion=attack, prompt=prompt, components=[(attack, 0.0)])])
    for command in (["list", str(tmp_path)], ["show", str(tmp_path), "000000001-0"]):
        shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["rollouts", *command]).output
        assert shown_as in shown
        assert not any(letter in shown for letter in "\x1b\x07\u202e")


def test_an_episode_is_shown_turn_by_turn_and_older_files_without_turns_are_read(tmp_path: Path) -> None:
    turns = [("assistant", "5"), ("user", "Higher."), ("assistant", "7")]
    messages = json.dumps([{"role": role, "content": content} for role, content in turns])
    episode = {"turns": 2, "messages": messages, "state": "{}", "sampled": [True, False]}
    write_step(tmp_path, 2, [row(2, 0, **episode)])
    write_step(tmp_path, 1, [row(1, 0)])
    older = tmp_path / "rollouts" / "step-1.parquet"
    pq.write_table(pq.read_table(older).drop_columns(list(episode)), older)
    shown = CliRunner().invoke(app, ["rollouts", "show", str(tmp_path), "000000002-0"]).output
    assert "(1 tokens in 2 turns, stop)" in shown
    assert "assistant\n5\nuser\nHigher.\nassistant\n7\n" in shown
    shown = CliRunner().invoke(app, ["rollouts", "show", str(tmp_path), "000000001-0"]).output
    assert "(2 tokens, stop)\ncb" in shown


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    for step in (1, 2, 10):
        write_step(tmp_path, step, [row(step, number) for number in range(4)])
    write_step(tmp_path, 11, [row(11, 9, environment="arithmetic", fate="zero_signal", completion="[bold]9[/bold]")])
    return tmp_path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["rollouts", *map(str, arguments)], env={"COLUMNS": "200"})


def test_rows_come_back_step_by_step(stored: Path) -> None:
    found = dict(read_steps(stored, first=2, last=10))
    assert list(found) == [2, 10]
    assert found[2][1]["components"] == {"exact": 0.0}
    assert found[2][1]["logprobs"] == [-0.5, -0.25]


def test_an_interrupted_write_loses_no_earlier_row(stored: Path) -> None:
    (stored / "rollouts" / "step-12.part").write_bytes(b"PAR1 half of a file")
    assert [step for step, _ in read_steps(stored)] == [1, 2, 10, 11]


def test_a_step_that_is_collected_again_replaces_what_was_stored(stored: Path) -> None:
    write_step(stored, 10, [row(10, 8)])
    assert [item["rollout_id"] for item in dict(read_steps(stored))[10]] == ["000000010-8"]


def test_the_oldest_steps_make_room(stored: Path) -> None:
    size = step_files(stored)[0][1].stat().st_size
    assert make_room(stored, int(2.5 * size)) == 2
    assert [step for step, _ in step_files(stored)] == [10, 11]
    assert make_room(stored, 0) == 1, "the newest step stays, whatever it takes"


def test_a_file_that_is_damaged_and_a_folder_without_rollouts_are_named(stored: Path, tmp_path: Path) -> None:
    (stored / "rollouts" / "step-2.parquet").write_bytes(b"rubbish")
    with pytest.raises(DataLossError, match=r"step-2\.parquet"):
        list(read_steps(stored))
    with pytest.raises(NotFoundError, match="output folder of a GRPO job"):
        list(read_steps(tmp_path / "elsewhere"))


def test_list_shows_the_newest_the_best_and_the_worst(stored: Path) -> None:
    newest = [json.loads(line) for line in run("list", stored, "--json", "--limit", 2).stdout.splitlines()]
    assert [item["rollout_id"] for item in newest] == ["000000011-9", "000000010-3"]
    worst = run("list", stored, "--sort", "worst", "--limit", 1, "--from", 2, "--json").stdout
    assert json.loads(worst)["reward"] == 0.0
    best = run("list", stored, "--sort", "best", "--env", "reverse-text", "--limit", 1, "--json").stdout
    assert json.loads(best)["reward"] == 0.3
    table = run("list", stored).stdout
    assert "[bold]9[/bold]" in table, "what a model wrote is never markup"


def test_list_shows_ids_whole_in_a_narrow_terminal(tmp_path: Path) -> None:
    write_step(tmp_path, 1, [row(1, 3, rollout_id="000000007-0003", prompt=json.dumps([]), completion="x" * 500)])
    shown = CliRunner().invoke(app, ["rollouts", "list", str(tmp_path)], env={"COLUMNS": "80"}).output
    assert "000000007-0003" in shown, "`rollouts show` wants the id"


def test_show_prints_one_whole_and_names_one_that_is_not_there(stored: Path) -> None:
    shown = run("show", stored, "000000011-9").stdout
    assert "[bold]9[/bold]" in shown
    assert "built-in" in shown
    missing = run("show", stored, "nothing")
    assert isinstance(missing.exception, NotFoundError)


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_export_writes_one_file(stored: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    assert run("export", stored, target, "--fate", "trained").exit_code == 0
    text = target.read_text() if target.suffix != ".parquet" else ""
    count = {
        ".jsonl": lambda: len(text.splitlines()),
        ".csv": lambda: len(list(csv.DictReader(text.splitlines()))),
        ".parquet": lambda: pq.read_table(target).num_rows,
    }[target.suffix]()
    assert count == 12


def test_export_refuses_other_kinds_of_files(stored: Path, tmp_path: Path) -> None:
    assert "jsonl" in str(run("export", stored, tmp_path / "out.xlsx").exception)

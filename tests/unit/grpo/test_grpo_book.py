"""Which prompt comes next: passes, ratios of environments, and prompts that are laid aside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from orchestrator_svc.grpo.configured.difficulty import Difficulty, Pool
from orchestrator_svc.grpo.groups import Draw, Group, Prompt, Rollout
from orchestrator_svc.grpo.prompts.book import PromptBook
from orchestrator_svc.grpo.prompts.pools import Pools
from orchestrator_svc.grpo.prompts.pools_file import load_pools, save_pools
from surogate.errors import ConfigError, DataLossError
from surogate.structs import to_struct
from surogate.v1 import common_pb2, reward_pb2


def prompt(environment: str, number: int, text: str = "") -> Prompt:
    words = [common_pb2.ChatMessage(role="user", content=text or f"{environment} {number}")]
    fields = to_struct({"level": number})
    return Prompt(environment, reward_pb2.Example(id=str(number), prompt=words, fields=fields), [1, 2])


A = [prompt("a", number) for number in range(6)]
B = [prompt("b", number) for number in range(4)]


def book(pools: Pools | None = None, **options: object) -> PromptBook:
    return PromptBook([*A, *B], 7, pools=pools or Pools(Difficulty()), **options)  # type: ignore[arg-type]


def keys(book: PromptBook, first: int, count: int) -> list[str]:
    drawn = [book.draw(ordinal) for ordinal in range(first, first + count)]
    return [item.prompt.key for item in drawn if item is not None]


def group(of: Prompt, *rewards: float) -> Group:
    rollouts = [
        Rollout(str(i), np.zeros(1, np.int32), np.zeros(1, np.float32), common_pb2.FINISH_REASON_STOP, [], reward)
        for i, reward in enumerate(rewards)
    ]
    return Group(Draw(0, 1, of), rollouts, 1.0)


def test_every_prompt_comes_once_in_a_pass_and_in_another_order_in_the_next() -> None:
    found = keys(book(), 0, 20)
    assert set(found[:10]) == set(found[10:]) == {item.key for item in [*A, *B]}
    assert len(set(found[:10])) == 10
    assert found[:10] != found[10:]


def test_a_book_goes_on_where_its_decks_were() -> None:
    ratios = {"a": 3.0, "b": 1.0}
    whole = keys(book(ratios=ratios), 0, 30)
    first = book(ratios=ratios)
    positions = {}
    for ordinal in range(12):
        drawn = first.draw(ordinal)
        assert drawn is not None
        positions[drawn.deck] = drawn.position + 1
    again = book(ratios=ratios)
    again.go_on(positions)
    assert keys(again, 12, 18) == whole[12:]
    skipped = book(ratios=ratios)
    skipped.skip(12)
    assert keys(skipped, 12, 18) == whole[12:]


def test_environments_come_by_their_ratios() -> None:
    found = Counter(key.partition("/")[0] for key in keys(book(ratios={"a": 1.0, "b": 3.0}), 0, 2000))
    assert found["b"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_without_replacement_every_prompt_comes_once_and_then_none() -> None:
    drawn = keys(book(once=True, ratios={"a": 1.0, "b": 1.0}), 0, 20)
    assert sorted(drawn) == sorted(item.key for item in [*A, *B])


def test_prompts_that_are_too_easy_or_too_hard_are_laid_aside() -> None:
    pools = Pools(Difficulty(easy_threshold=0.9, hard_threshold=0.1))
    moves = pools.classify([group(A[0], 1, 1), group(A[1], 0, 0.1), group(A[2], 0, 1)])
    assert moves == {"a/0": Pool.EASY, "a/1": Pool.HARD}
    assert not {"a/0", "a/1"} & set(keys(book(pools), 0, 30))


def test_some_come_back_when_few_are_left() -> None:
    rules = Difficulty(easy_threshold=0.5, min_normal=7, recycle_easy=0.5)
    pools = Pools(rules)
    pools.classify([group(item, 1, 1) for item in A[:2]])
    assert pools.recycle(10, 0) == {}  # 8 are left, more than 7
    pools.classify([group(item, 1, 1) for item in A[2:4]])
    assert len(pools.recycle(10, 1)) == 2
    assert len(pools.laid_aside) == 2


def test_when_all_are_laid_aside_all_come_back() -> None:
    pools = Pools(Difficulty(easy_threshold=0.5))
    pools.classify([group(item, 1, 1) for item in [*A, *B]])
    assert len(pools.recycle(10, 0)) == 10
    assert len(keys(book(pools), 0, 10)) == 10


def test_a_job_that_goes_on_from_a_checkpoint_takes_over_what_was_laid_aside(tmp_path: Path) -> None:
    aside = {"a/1": Pool.EASY, "b/3": Pool.HARD, "gone/1": Pool.EASY}
    save_pools(tmp_path, 40, aside, [*A, *B], ["task", "prompt"])
    renumbered = [prompt("a", 99, text="a 1"), *B]
    assert load_pools(tmp_path, 40, renumbered, ["task", "prompt"]) == {"a/99": Pool.EASY, "b/3": Pool.HARD}
    assert load_pools(tmp_path, 50, renumbered, ["task", "prompt"]) == {}
    pools = Pools(Difficulty(easy_fraction=1.0), {"a/1": Pool.EASY, "b/3": Pool.HARD})
    assert pools.begin_anew() == {"a/1": None}
    (tmp_path / "buffer" / "step-40.json").write_text("{}")
    with pytest.raises(DataLossError, match="skip_buffer"):
        load_pools(tmp_path, 40, renumbered, ["task", "prompt"])


def test_examples_are_told_apart_by_fields_of_their_own_and_a_missing_one_is_named(tmp_path: Path) -> None:
    save_pools(tmp_path, 1, {"a/1": Pool.EASY}, A, ["level"])
    assert load_pools(tmp_path, 1, [prompt("c", 1, text="other")], ["level"]) == {"c/1": Pool.EASY}
    with pytest.raises(ConfigError, match="hash_keys"):
        save_pools(tmp_path, 2, {"a/1": Pool.EASY}, A, ["colour"])

"""Tokenizers and chat templates as published models have them: GRPO's prompts and supervised rows are transformers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orchestrator_svc.grpo.rollouts.tokenizer import ChatTokenizer
from surogate.errors import ConfigError, InvalidInputError
from tests.helpers.models.engine import open_engine
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.models.tokenizer_kinds import CHATML, KINDS, make_tokenizer
from tests.unit.grpo.test_grpo_tokenizer import CONVERSATIONS, as_proto
from trainer_svc.worker.commands.tokenize import main as tokenize
from trainer_svc.worker.data.chat import ChatRenderer, PlainRenderer
from trainer_svc.worker.data.encode import encode

CHATS = [name for name, kind in KINDS.items() if kind.template is not None]
TURNS = [
    {"role": "user", "content": "What is 12 + 30? It's easy."},
    {"role": "assistant", "content": "42, of course"},
    {"role": "user", "content": "And the fox?"},
    {"role": "assistant", "content": "It jumps: Grüße 你好!"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("tokenizers")
    for name in KINDS:
        make_tokenizer(name, path / name)
    return path


def theirs_of(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_those_of_apply_chat_template(folder: Path, name: str) -> None:
    theirs, ours = theirs_of(folder / name), ChatTokenizer.load(str(folder / name))
    for messages in [*CONVERSATIONS, TURNS[:3], [SYSTEM, TURNS[0]]]:
        if KINDS[name].systemless and messages[0]["role"] == "system":
            with pytest.raises(ConfigError, match=r"System role not supported; put what the system message says"):
                ours.encode_prompts([as_proto(messages)])
            continue
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_prompts([as_proto(messages)]) == [expected], theirs.convert_ids_to_tokens(expected)


@pytest.mark.parametrize("name", KINDS)
def test_completions_are_read_as_by_transformers(folder: Path, name: str) -> None:
    theirs, ours = theirs_of(folder / name), ChatTokenizer.load(str(folder / name), CHATML)
    for text in ("It's 42, of course", " a\n\n b", "Grüße 你好 🙂"):
        ids = theirs.encode(text, add_special_tokens=False)
        ends = [] if theirs.eos_token_id is None else [theirs.eos_token_id]
        found = ours.decode([np.array([*ids, *ends, len(theirs) + 7], np.int32)])
        assert found == [theirs.decode(ids, skip_special_tokens=True)], "an id of padding of the vocabulary is no text"


@pytest.mark.parametrize("name", CHATS)
def test_assistant_only_loss_learns_the_answers(folder: Path, name: str) -> None:
    tokenizer = theirs_of(folder / name)
    rendered = ChatRenderer(tokenizer).render(TURNS)
    (document,) = encode([rendered], tokenizer, raw_text=False)
    assert document.token_ids.tolist() == tokenizer.apply_chat_template(TURNS, return_dict=False)
    said = [tokenizer.decode(document.token_ids[run], skip_special_tokens=True) for run in runs(document.mask)]
    clean = [text.replace("answer", "").strip() for text in said]
    assert len(clean) == 2
    for text, turn in zip(clean, TURNS[1::2], strict=True):
        known = tokenizer.decode(tokenizer.encode(turn["content"], add_special_tokens=False), skip_special_tokens=True)
        assert text.startswith(known.strip()), "all of the answer"
        assert "What" not in text and "fox" not in text, "and nothing of the question"


def runs(mask: np.ndarray[Any, Any]) -> list[slice]:
    """Where a mask is true without a break."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [slice(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary is larger than that of each tokenizer, and conversations."""
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, layers=1, hidden=32, vocab_size=512)
    (path / "chat_template.jinja").unlink()
    (path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": TURNS})] * 8))
    return path


@pytest.mark.parametrize("name", KINDS)
def test_a_run_and_surogate_tokenize_take_every_kind(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SUROGATE_CACHE_DIR", str(tmp_path / "cache"))
    folder = shutil.copytree(model, tmp_path / "model")
    make_tokenizer(name, folder)
    train = {
        "model": str(folder), "sequence_len": 512, "max_steps": 2, "optimizer": "adamw", "validation_split_ratio": 0,
        "datasets": [{"path": str(folder / "chats.jsonl"), "type": "conversation"}], "lora_rank": 2,
        "use_chat_template": KINDS[name].template is not None, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    engine, reporter = open_engine("sft", tmp_path / "out", train)
    engine.run()
    assert len(reporter.losses) == 2 and all(5 < loss < 7 for loss in reporter.losses), "about log 512"
    saved, before = AutoTokenizer.from_pretrained(tmp_path / "out"), theirs_of(folder)
    text = TURNS[3]["content"]
    assert saved(text).input_ids == before(text).input_ids, "what is saved beside the adapter is the same tokenizer"
    (tmp_path / "train.yaml").write_text(json.dumps({**train, "output_dir": str(tmp_path / "out")}))
    assert tokenize([str(tmp_path / "train.yaml"), "--debug", "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "found in the cache" in shown and "sample 0" in shown


def test_a_base_model_without_a_template(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "no-template")
    with pytest.raises(ConfigError, match=r"has no chat template: set train\.template to one"):
        ChatTokenizer.load(path)
    (tmp_path / "chat.jinja").write_text(CHATML)
    prompt = as_proto(TURNS[:1])
    ids = ChatTokenizer.load(path, str(tmp_path / "chat.jinja")).encode_prompts([prompt])
    assert ids == ChatTokenizer.load(path, CHATML).encode_prompts([prompt])
    theirs = theirs_of(Path(path))
    assert ids == [theirs.apply_chat_template(TURNS[:1], chat_template=CHATML, add_generation_prompt=True).input_ids]
    with pytest.raises(ConfigError, match=r"train\.template: is neither"):
        ChatTokenizer.load(path, str(tmp_path / "missing.jinja"))
    (document,) = encode([PlainRenderer(theirs).render(TURNS)], theirs, raw_text=False)
    assert theirs.decode(document.token_ids[document.mask]).count("<|endoftext|>") == 2


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({}, "llama"),
        ({"legacy": True}, "llama"),
        ({"add_prefix_space": False}, "llama"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "llama"),
        ({}, "mistral"),
        ({}, "phi3"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "llama"),
    ],
)
def test_llama_tokenizers_are_made_as_in_transformers(
    folder: Path, tmp_path: Path, config: dict[str, Any], model_type: str
) -> None:
    make_tokenizer("llama2", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    expected = theirs_of(tmp_path).apply_chat_template(TURNS[:3], return_dict=False)
    assert ChatTokenizer.load(str(tmp_path)).encode_prompts([as_proto(TURNS[:3])]) == [expected]


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ messages[0]['content'].nothing() }}", "{{ [].pop() }}"])
def test_a_template_that_fails_is_told_without_a_traceback(folder: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="the chat template refuses the prompt"):
        ChatTokenizer.load(str(folder / "qwen"), template).encode_prompts([as_proto(TURNS[:1])])
    tokenizer = theirs_of(folder / "qwen")
    tokenizer.chat_template = template
    with pytest.raises(InvalidInputError, match="the chat template refuses the conversation"):
        ChatRenderer(tokenizer).render(TURNS)


def test_thinking_is_what_the_template_has_without_being_asked(folder: Path) -> None:
    theirs, ours = theirs_of(folder / "qwen-thinking"), ChatTokenizer.load(str(folder / "qwen-thinking"))
    (ids,) = ours.encode_prompts([as_proto(TURNS[:1])])
    assert ids == theirs.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    quiet = theirs.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False, enable_thinking=False)
    assert ids != quiet

"""From files to encoded data: every kind and format, what is held out, and errors that name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from surogate.config.train import TrainConfig
from surogate.errors import ConfigError
from tests.helpers.models.tiny import VOCAB_SIZE, make_tiny_tokenizer
from tests.helpers.models.tokenizer_kinds import make_tokenizer
from trainer_svc.worker.data.chat import ChatRenderer, Rendered
from trainer_svc.worker.data.encode import encode
from trainer_svc.worker.data.prepare import SessionData, prepare
from trainer_svc.worker.data.store import EncodedData

TOKENIZER = make_tiny_tokenizer()
TEXTS = [{"text": f"text number {number}"} for number in range(10)]
PAIRS = [{"q": f"say {n}", "a": str(n), "more": "twice" if n % 2 else "", "sys": f"S{n}"} for n in range(4)]
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{n}"}]} for n in range(6)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(dataset: dict[str, Any] | list[dict[str, Any]], **keys: Any) -> tuple[SessionData, list[str]]:
    entries = dataset if isinstance(dataset, list) else [dataset]
    train = {"model": "m", "optimizer": "adamw", "datasets": entries, "validation_split_ratio": 0, **keys}
    warnings: list[str] = []
    return prepare(TrainConfig.model_validate(train), TOKENIZER, VOCAB_SIZE, warnings.append), warnings


def texts(data: EncodedData) -> list[str]:
    return [TOKENIZER.decode(data[index].token_ids) for index in range(len(data))]


def learned(data: EncodedData) -> list[str]:
    return [TOKENIZER.decode(data[index].token_ids[data[index].mask]) for index in range(len(data))]


def violation(error: pytest.ExceptionInfo[ConfigError]) -> tuple[str, str]:
    (found,) = error.value.violations
    return found.field, found.description


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "csv", "folder", "saved"])
def test_every_form_of_file_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    table = datasets.Dataset.from_list(TEXTS)
    path = tmp_path / f"data.{form}"
    match form:
        case "jsonl":
            write_jsonl(path, TEXTS)
        case "json":
            path.write_text(json.dumps(TEXTS))
        case "parquet":
            table.to_parquet(path)
        case "csv":
            table.to_csv(path)
        case "folder":
            path.mkdir()
            write_jsonl(path / "train-0.jsonl", TEXTS[:4])
            write_jsonl(path / "train-1.jsonl", TEXTS[4:])
            write_jsonl(path / "test.jsonl", [{"text": "not this"}])
        case "saved":
            table.save_to_disk(str(path))
    data, _ = prepared({"path": str(path), "type": "text"})
    assert texts(data.training) == [row["text"] + "<|im_end|>" for row in TEXTS]


def test_plain_text_files_have_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    data, _ = prepared({"path": str(tmp_path / "a.txt"), "type": "text"})
    assert texts(data.training) == ["one<|im_end|>", "two<|im_end|>"]


def test_long_texts_are_split_whatever_the_truncation(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 100}])
    data, warnings = prepared({"path": path, "type": "text"}, sequence_len=16)
    assert sum(len(data.training[i].trained) for i in range(len(data.training))) == 100
    assert warnings == []


def test_instruction_by_chat_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    entry = {"path": path, "type": "instruction", "instruction_field": "q", "output_field": "a", "input_field": "more"}
    data, _ = prepared({**entry, "system_prompt_type": "field", "system_prompt_field": "sys"})
    assert texts(data.training)[1] == (
        "<|im_start|>system\nS1<|im_end|>\n<|im_start|>user\nsay 1\ntwice<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n"
    )
    assert learned(data.training)[1] == "1<|im_end|>"


def test_instruction_by_prompt_format(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    entry = {"path": path, "type": "instruction", "instruction_field": "q", "output_field": "a", "input_field": "more"}
    formats = {"prompt_format": "{system}|{instruction}({input})=", "prompt_format_no_input": "{instruction}={output}."}
    data, _ = prepared({**entry, **formats, "system_prompt_type": "fixed", "system_prompt": "S"})
    assert texts(data.training)[:2] == ["say 0=0.<|im_end|>", "S|say 1(twice)=1<|im_end|>"]
    assert learned(data.training)[:2] == ["0.<|im_end|>", "1<|im_end|>"]


def test_braces_of_a_prompt_format_are_told_from_its_places(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    entry = {"path": path, "type": "instruction", "instruction_field": "q", "output_field": "a"}
    data, _ = prepared({**entry, "prompt_format": '{{"q": "{instruction}", "{{output}}": "{output}"}}'})
    assert texts(data.training)[0] == '{"q": "say 0", "{output}": "0"}<|im_end|>'
    assert learned(data.training)[0] == '0"}<|im_end|>'


def test_a_word_that_is_one_token_with_the_blank_before_it_is_learnt(tmp_path: Path) -> None:
    make_tokenizer("qwen", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text, start in (("name: user fox", 6), ("name:\n user", 7), ("name: user", 5)):
        (document,) = encode([Rendered(text, ((start, len(text)),))], tokenizer, raw_text=False)
        said = tokenizer.decode(document.token_ids[document.mask])
        assert said.strip() == text[start:].strip()
    (document,) = encode([Rendered("name: user", ((8, 10),))], tokenizer, raw_text=False)
    assert not document.mask.any(), "half of a word is no blank"


def test_conversation_with_other_names(tmp_path: Path) -> None:
    rows = [{"talk": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "s": "sys"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    names = {"role": "from", "content": "value"}
    entry = {"path": path, "type": "conversation", "messages_field": "talk", "system_field": "s"}
    data, _ = prepared({**entry, "message_property_mappings": names})
    assert texts(data.training) == [
        "<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    ]
    assert learned(data.training) == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (TEXTS[:1], "text number 0<|im_end|>"),
        (CHATS[:1], "b0<|im_end|>"),
        ([{"prompt": "p", "completion": "c"}], "c<|im_end|>"),
    ],
)
def test_auto_tells_the_kind(tmp_path: Path, rows: list[dict[str, Any]], expected: str) -> None:
    data, _ = prepared({"path": write_jsonl(tmp_path / "a.jsonl", rows), "type": "auto"})
    assert learned(data.training) == [expected]


def test_default_system_prompt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS[:1])
    data, _ = prepared({"path": path, "type": "conversation"}, system="Be good.")
    assert texts(data.training)[0].startswith("<|im_start|>system\nBe good.<|im_end|>")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    from trainer_svc.worker.data.tokenizer import load_tokenizer

    make_tiny_tokenizer(tmp_path / "model")
    (tmp_path / "mine.jinja").write_text("mine")
    keys = {"model": str(tmp_path / "model"), "optimizer": "adamw"}
    loaded = load_tokenizer(TrainConfig.model_validate({**keys, "template": str(tmp_path / "mine.jinja")}))
    assert loaded.chat_template == "mine"
    with pytest.raises(ConfigError) as error:
        load_tokenizer(TrainConfig.model_validate({**keys, "template": "nowhere.jinja"}))
    with pytest.raises(ConfigError, match=r"model: there is no folder /nowhere/model; give a model's folder"):
        load_tokenizer(TrainConfig.model_validate({**keys, "model": "/nowhere/model"}))
    assert violation(error)[0] == "train.template"
    broken = make_tiny_tokenizer(chat_template="{{ bos_token }}\n{% for m in %}")
    with pytest.raises(ConfigError) as error:
        ChatRenderer(broken).render([{"role": "assistant", "content": "b"}])
    assert violation(error) == (
        "train.template",
        "is not a Jinja template: line 2: Expected an expression, got 'end of statement block'",
    )


def test_samples_and_several_datasets(tmp_path: Path) -> None:
    first = {"path": write_jsonl(tmp_path / "a.jsonl", TEXTS), "type": "text", "samples": 2}
    second = {"path": write_jsonl(tmp_path / "b.jsonl", [{"body": "b"}]), "type": "text", "text_field": "body"}
    data, _ = prepared([first, second])
    assert texts(data.training) == ["text number 0<|im_end|>", "text number 1<|im_end|>", "b<|im_end|>"]


def test_a_part_is_held_out_by_eval_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data, _ = prepared({"path": path, "type": "text"}, validation_split_ratio=0.3)
    again, _ = prepared({"path": path, "type": "text"}, validation_split_ratio=0.3)
    other, _ = prepared({"path": path, "type": "text"}, validation_split_ratio=0.3, eval_seed=2)
    assert data.held_out is not None and again.held_out is not None and other.held_out is not None
    assert (len(data.training), len(data.held_out)) == (7, 3)
    assert sorted(texts(data.training) + texts(data.held_out)) == sorted(f"{row['text']}<|im_end|>" for row in TEXTS)
    assert texts(data.held_out) == texts(again.held_out) != texts(other.held_out)


def test_validation_datasets_leave_the_training_data_whole(tmp_path: Path) -> None:
    entry = {"path": write_jsonl(tmp_path / "a.jsonl", TEXTS), "type": "text"}
    held = {"path": write_jsonl(tmp_path / "v.jsonl", TEXTS[:2]), "type": "text"}
    data, _ = prepared(entry, validation_datasets=[held], validation_split_ratio=0.5)
    assert data.held_out is not None
    assert (len(data.training), len(data.held_out)) == (10, 2)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    silent = {"messages": [{"role": "user", "content": "anyone?"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [*CHATS, long, silent])
    data, warnings = prepared({"path": path, "type": "conversation"}, max_length=100)
    assert len(data.training) == 6
    assert warnings == [
        "train.datasets.0: 1 of 8 rows are longer than 100 tokens and were left out",
        "train.datasets.0: 1 of 8 rows have nothing to learn and were left out",
    ]


BAD: dict[str, tuple[list[dict[str, Any]] | str | None, dict[str, Any], str, str]] = {
    "missing file": (None, {"type": "text"}, "path", "no file or folder"),
    "empty file": ("", {"type": "text"}, "path", "is empty"),
    "broken line": ('{"text": "a"}\n\n{not json\n', {"type": "text"}, "path", "a.jsonl:3: is not JSON: "),
    "line that is no object": ('{"text": "a"}\n["b"]\n', {"type": "text"}, "path", "a.jsonl:2: is list, and a row"),
    "columns of several kinds": (
        '{"text": "a"}\n{"text": {"b": 1}}\n',
        {"type": "text"},
        "path",
        "row 2: column `text` holds dict",
    ),
    "missing column": (TEXTS, {"type": "text", "text_field": "txt"}, "text_field", "`txt`; the columns are text"),
    "missing answers": (
        PAIRS,
        {"type": "instruction", "instruction_field": "q", "output_field": "answer"},
        "output_field",
        "no column `answer`; the columns are q, a, more, sys",
    ),
    "missing messages": (TEXTS, {"type": "conversation"}, "messages_field", "no column `messages`"),
    "unknown kind": (PAIRS, {"type": "auto"}, "type", "columns q, a, more, sys"),
    "not text": ([{"text": [3]}], {"type": "text"}, "path", "row 1: column `text` holds list"),
    "other properties": (
        [{"messages": [{"from": "x", "value": "y"}]}],
        {"type": "conversation"},
        "path",
        "set message_property_mappings.role",
    ),
    "nothing to learn": (
        [{"messages": [{"role": "user", "content": "x"}]}],
        {"type": "conversation"},
        "path",
        "leaves nothing to learn",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_names_the_key(tmp_path: Path, name: str) -> None:
    content, entry, key, said = BAD[name]
    path = tmp_path / "a.jsonl"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        write_jsonl(path, content)
    with pytest.raises(ConfigError) as error:
        prepared({"path": str(path), **entry})
    field, description = violation(error)
    assert field == f"train.datasets.0.{key}"
    assert said in description


def test_a_missing_split_lists_those_there_are(tmp_path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list(TEXTS)).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ConfigError) as error:
        prepared({"path": str(tmp_path / "d"), "type": "text", "split": "dev"})
    assert violation(error) == ("train.datasets.0.split", "there is no split `dev`; there are train")


def test_when_nothing_can_be_held_out_nothing_is_evaluated(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:1])
    data, warnings = prepared({"path": path, "type": "text"}, validation_split_ratio=0.5)
    assert data.held_out is None
    assert len(data.training) == 1
    assert "nothing of the data was held out" in warnings[0]


def test_what_was_made_of_each_dataset_is_counted(tmp_path: Path) -> None:
    entry = {"path": write_jsonl(tmp_path / "a.jsonl", CHATS), "type": "conversation"}
    data, _ = prepared([entry, {**entry, "samples": 2}], validation_split_ratio=0.3)
    first, second = data.counts
    assert (first.rows, first.held_out, first.documents, first.learned) == (6, 2, 4, 4 * 3)
    assert (second.key, second.rows, second.kind) == ("train.datasets.1", 2, "conversation")
    assert first.tokens + second.tokens == data.training.num_tokens


def test_tools_come_as_lists_or_as_json_without_the_nulls_of_tables(tmp_path: Path) -> None:
    tools = [
        {"name": "f", "parameters": {"x": {"type": "integer"}, "y": None}},
        {"name": "g", "parameters": {"x": None, "y": {"type": "string"}}},
    ]
    shown = "{{- tools | tojson }}{%- for m in messages %}{{- m.content }}{%- endfor %}"
    messages = CHATS[0]["messages"]
    (tmp_path / "t.jinja").write_text(shown)
    datasets.Dataset.from_list([{"messages": messages, "tools": tools}]).to_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", [{"messages": messages, "tools": json.dumps(tools)}])
    tokenizer = make_tiny_tokenizer(chat_template=shown)
    for name in ("a.parquet", "b.jsonl"):
        entry = {"path": str(tmp_path / name), "type": "conversation", "tools_field": "tools"}
        train = TrainConfig.model_validate(
            {"model": "m", "datasets": [entry], "loss_scale": "all", "validation_split_ratio": 0, "optimizer": "adamw"}
        )
        data = prepare(train, tokenizer, VOCAB_SIZE, lambda text: None)
        (text,) = texts(data.training)
        assert json.loads(text.removesuffix("ab0")) == [
            {"name": "f", "parameters": {"x": {"type": "integer"}}},
            {"name": "g", "parameters": {"y": {"type": "string"}}},
        ]


def test_tools_that_are_none_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**CHATS[0], "tools": "3"}])
    with pytest.raises(ConfigError) as error:
        prepared({"path": path, "type": "conversation", "tools_field": "tools"})
    assert violation(error) == ("train.datasets.0.path", "row 1: `tools` is not a list of tool definitions")


def chat(*contents: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


def test_rows_without_content_are_counted_and_left_out(tmp_path: Path) -> None:
    rows = [chat("a", "b"), {"messages": None}, {"messages": []}, {"other": 1}]
    data, warnings = prepared({"path": write_jsonl(tmp_path / "chats.jsonl", rows), "type": "conversation"})
    assert (len(data.training), data.counts[0].empty) == (1, 3)
    assert warnings == ["train.datasets.0: 3 of 4 rows have nothing to learn and were left out"]
    pairs = [{"q": None, "a": "x"}, {"q": "x", "a": None}, {"q": "x", "a": "y"}]
    fields = {"type": "instruction", "instruction_field": "q", "output_field": "a", "prompt_format": "{instruction}="}
    data, _ = prepared({"path": write_jsonl(tmp_path / "pairs.jsonl", pairs), **fields})
    assert (texts(data.training), data.counts[0].empty) == (["x=y<|im_end|>"], 2)
    data, _ = prepared({"path": write_jsonl(tmp_path / "t.jsonl", [{"text": None}, {"text": "x"}]), "type": "text"})
    assert (texts(data.training), data.counts[0].empty) == (["x<|im_end|>"], 1)


def test_messages_as_chat_services_have_them(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    rows = [chat("a", "two parts"), chat([{"type": "text", "text": "a"}], parts)]
    data, _ = prepared({"path": write_jsonl(tmp_path / "a.jsonl", rows[:1]), "type": "conversation"})
    as_parts, _ = prepared({"path": write_jsonl(tmp_path / "b.jsonl", rows[1:]), "type": "conversation"})
    assert texts(data.training) == texts(as_parts.training)
    image = chat([{"type": "image_url", "image_url": {"url": "x"}}], "b")
    with pytest.raises(ConfigError, match="a part of type image_url; only text can be learnt"):
        prepared({"path": write_jsonl(tmp_path / "c.jsonl", [image]), "type": "conversation"})


def test_messages_as_json_in_a_table_of_text(tmp_path: Path) -> None:
    plain, _ = prepared({"path": write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")]), "type": "conversation"})
    datasets.Dataset.from_list([{"messages": json.dumps(chat("a", "b")["messages"])}]).to_csv(tmp_path / "a.csv")
    data, _ = prepared({"path": str(tmp_path / "a.csv"), "type": "conversation"})
    assert texts(data.training) == texts(plain.training)


def test_auto_knows_the_form_of_sharegpt(tmp_path: Path) -> None:
    plain, _ = prepared({"path": write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")]), "type": "conversation"})
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": []}, {"conversations": talk}]
    data, _ = prepared({"path": write_jsonl(tmp_path / "b.jsonl", rows), "type": "auto"})
    assert texts(data.training) == texts(plain.training)


def test_what_a_csv_file_has_is_text(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("q,a\n1+1,2\n007,NA\nnull,\n", encoding="utf-8-sig")
    fields = {"type": "instruction", "instruction_field": "q", "output_field": "a", "prompt_format": "{instruction}="}
    data, _ = prepared({"path": str(file), **fields})
    assert texts(data.training) == ["1+1=2<|im_end|>", "007=NA<|im_end|>", "null=<|im_end|>"]


def test_numbers_are_learnt_as_they_are_written(tmp_path: Path) -> None:
    rows = [{"text": 3}, {"text": 4}]
    data, _ = prepared({"path": write_jsonl(tmp_path / "a.jsonl", rows), "type": "text"})
    assert texts(data.training) == ["3<|im_end|>", "4<|im_end|>"]


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a?b.jsonl", "a b.jsonl", "ä{1,2}.jsonl"])
def test_names_of_files_are_no_patterns(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "axb.jsonl", [{"text": "another"}])
    data, _ = prepared({"path": write_jsonl(tmp_path / name, TEXTS[:2]), "type": "text"})
    assert texts(data.training) == [row["text"] + "<|im_end|>" for row in TEXTS[:2]]


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\26\7")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write_jsonl(tmp_path / ".ipynb_checkpoints" / "a.jsonl", TEXTS)
    data, _ = prepared({"path": str(tmp_path), "type": "text"})
    assert len(data.training) == 2


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        prepared({"path": str(file), "type": "text"})
    (tmp_path / "b.csv").write_text("text\n")
    with pytest.raises(ConfigError, match="has no rows"):
        prepared({"path": str(tmp_path / "b.csv"), "type": "text"})
    with pytest.raises(ConfigError, match=r"train\.datasets\.0\.split.* has no rows in train\[:0\]"):
        prepared({"path": write_jsonl(tmp_path / "c.jsonl", TEXTS), "type": "text", "split": "train[:0]"})
    folder = tmp_path / "differing"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS)
    write_jsonl(folder / "b.jsonl", [{"text": "x", "more": 1}])
    with pytest.raises(ConfigError, match="its files differ in columns"):
        prepared({"path": str(folder), "type": "text"})


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    from trainer_svc.worker.data.tokenizer import load_tokenizer

    Qwen3Config(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.model: .* has no tokenizer"):
        load_tokenizer(TrainConfig.model_validate({"model": str(tmp_path)}))


def test_weights_of_another_shape_than_the_configuration_are_told(tmp_path: Path) -> None:
    from tests.helpers.models.tiny import make_tiny_model
    from trainer_svc.worker.model.modeling import load_model

    make_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    train = TrainConfig.model_validate({"model": str(tmp_path), "torch_dtype": "float32", "sequence_len": 16})
    with pytest.raises(ConfigError, match=r"train\.model: .* the weights have other shapes than config\.json says"):
        load_model(train)

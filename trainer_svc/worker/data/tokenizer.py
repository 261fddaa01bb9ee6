"""The tokenizer of a session, with the chat template that the configuration asks for."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from surogate.config.train import TrainConfig
from trainer_svc.worker.errors import config_error
from trainer_svc.worker.model.modeling import require_folder, unreadable
from trainer_svc.worker.paths import is_local, model_source


def load_tokenizer(train: TrainConfig) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer. Raises ConfigError if there is none that tells where its tokens are in the text."""
    path = model_source(train.model)
    if is_local(train.model):
        require_folder(Path(path))  # else transformers says that it is no name on the hub
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise config_error("model", f"has no tokenizer: {unreadable(path, error)}") from error
    if not tokenizer.is_fast:
        raise config_error("model", f"{path} has no fast tokenizer (tokenizer.json); convert its tokenizer first")
    if set(tokenizer("a b c", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
        # For some architectures transformers makes an empty tokenizer where there are no files of one.
        raise config_error("model", f"{path} has no tokenizer: its files (tokenizer.json) are not there, or are empty")
    if train.template != "auto":
        tokenizer.chat_template = _template(train.template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template(value: str) -> str:
    """A Jinja template, or the file that holds one."""
    if "{" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise config_error("template", f"is neither `auto`, nor a Jinja template, nor a file ({path} is none)")
    return path.read_text(encoding="utf-8")

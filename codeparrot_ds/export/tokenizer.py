"""The tokenizer files of a converted model, which must agree with its configuration."""

from pathlib import Path

from codeparrot_ds.export.statements import TOKENIZER_CONFIG
from codeparrot_ds.system.files import parse_json, write_json
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE, load_tokenizer, tokenizer_files
from codeparrot_ds.tokenizer.encode import Encoder

# The only class that takes tokenizer.json as it is: others build a tokenizer of their own from its vocabulary.
_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
# Code of the Hub; a copy of what tokenizer.json says; tokens that transformers would add.
_NOT_COPIED = ("auto_map", "added_tokens_decoder", "add_bos_token", "add_eos_token")


def write_tokenizer(source: Path, directory: Path, seq_len: int) -> None:
    """Write the tokenizer of `source` into the directory of a model with a context of `seq_len` tokens.

    Ids stay those of training, whatever class the tokenizer's configuration names. The limit and the end token become
    the model's, and nothing is truncated, padded or added (as `<s>` is by Llama's), as in training, where only the end
    token is between documents. special_tokens_map.json is not copied: it repeats
    tokenizer_config.json. Raises DataError when the tokenizer is missing or damaged.
    """
    files = tokenizer_files(source)
    tokenizer = parse_json(files[TOKENIZER_FILE], str(source / TOKENIZER_FILE), "tokenizer")
    altering = ["truncation", "padding", *(["post_processor"] if _adds_tokens(source) else [])]
    if any(tokenizer.get(name) for name in altering):
        write_json(directory / TOKENIZER_FILE, {**tokenizer, **dict.fromkeys(altering)})
    else:
        (directory / TOKENIZER_FILE).write_bytes(files[TOKENIZER_FILE])
    config = {}
    if TOKENIZER_CONFIG in files:
        config = parse_json(files[TOKENIZER_CONFIG], str(source / TOKENIZER_CONFIG), "tokenizer configuration")
    end_token = Encoder(source).eos_token
    special = {f"{token}_token": end_token for token in ("bos", "eos")}
    if "pad_token" in config:
        special["pad_token"] = end_token
    kept = {key: value for key, value in config.items() if key not in _NOT_COPIED}
    write_json(directory / TOKENIZER_CONFIG, {**kept, **_CLASS, "model_max_length": seq_len, **special})


def _adds_tokens(source: Path) -> bool:
    """Whether the post-processor adds tokens to a text."""
    return int(load_tokenizer(source).num_special_tokens_to_add(is_pair=False)) > 0

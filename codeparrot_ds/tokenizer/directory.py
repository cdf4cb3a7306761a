"""A tokenizer's directory: its Hugging Face files, how they are read, and the token that ends a document."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import digest_bytes, dump_json, read_json, write_atomically
from codeparrot_ds.system.jobs import run_apart

EOS_TOKEN = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"  # of transformers
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_VOCABULARY_FILES = ("vocab.json", "merges.txt")  # of GPT-2 and its kin, from before there was a tokenizer.json
# What transformers reads beside them.
_READ_WITH_VOCABULARY = (*_VOCABULARY_FILES, CONFIG_FILE, SPECIAL_TOKENS_FILE, "added_tokens.json", "config.json")
_LISTED = 8  # special tokens named in a message


def has_tokenizer(directory: Path) -> bool:
    """Whether `tokenizer_json` finds files in `directory`."""
    return (directory / TOKENIZER_FILE).is_file() or all((directory / name).is_file() for name in _VOCABULARY_FILES)


def tokenizer_json(directory: Path) -> bytes:
    """Content of `directory`/tokenizer.json; without one, what transformers makes of vocab.json and merges.txt.

    Raises DataError when these are missing too, or transformers cannot read them.
    """
    path = directory / TOKENIZER_FILE
    if path.is_file():
        return path.read_bytes()
    if not has_tokenizer(directory):
        raise DataError(
            f"{path}: no such file, and no {' and '.join(_VOCABULARY_FILES)}. Create it with "
            "`codeparrot-ds tokenizer train`."
        )
    files = [directory / name for name in _READ_WITH_VOCABULARY]
    return _converted(directory, tuple(digest_bytes(file.read_bytes()) if file.is_file() else "" for file in files))


@lru_cache(maxsize=4)
def _converted(directory: Path, digests: tuple[str, ...]) -> bytes:
    """`digests` are of the files that are read. A process of its own, because transformers imports torch."""
    return run_apart(_convert, directory)


def _convert(directory: Path) -> bytes:
    from transformers import AutoTokenizer, GPT2TokenizerFast

    named = any((directory / name).is_file() for name in (CONFIG_FILE, "config.json"))
    kind = AutoTokenizer if named else GPT2TokenizerFast  # the files alone do not name a class
    try:
        tokenizer = kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        return str(tokenizer.backend_tokenizer.to_str(pretty=True)).encode()
    except Exception as error:  # of many types
        raise DataError(
            f"{directory}: transformers cannot read {' and '.join(_VOCABULARY_FILES)} here "
            f"({' '.join(str(error).split())[:200]}). Save the tokenizer with its save_pretrained()."
        ) from None


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of `directory` as a `tokenizers.Tokenizer`. Raises DataError."""
    from tokenizers import Tokenizer

    content = tokenizer_json(directory)
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises bare Exception on a bad file
        raise DataError(f"{directory / TOKENIZER_FILE}: not a tokenizer ({error}).") from None


def tokenizer_digest(directory: Path) -> str:
    """xxh3-128 of `tokenizer_json`. Raises DataError when there is no tokenizer."""
    return digest_bytes(tokenizer_json(directory))


def end_token(directory: Path, tokenizer: Any, wanted: str | None = None) -> str:
    """The token that ends a document.

    It is `wanted`, else the `eos_token` of tokenizer_config.json or special_tokens_map.json, else `<|endoftext|>`.

    Args:
        directory: of the tokenizer.
        tokenizer: the same tokenizer, loaded.
        wanted: name of the token, e.g. "</s>"; None for the default.

    Raises DataError when the tokenizer has no such token; the message lists its special tokens.
    """
    configured = configured_end_token(directory)
    name = wanted or configured or EOS_TOKEN
    if tokenizer.token_to_id(name) is not None:
        return name
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    listed = f": {', '.join(map(ascii, special[:_LISTED]))}" if special else "; it has none"
    said = "which its configuration names as eos_token" if name == configured else "which must end every document"
    raise DataError(
        f"{directory / TOKENIZER_FILE}: has no token {name!a}, {said}. Name one of its special tokens with "
        f"--eos{listed}."
    )


def configured_end_token(directory: Path) -> str | None:
    """The `eos_token` of a tokenizer's configuration files; None if they name none."""
    for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE):
        path = directory / name
        config = read_json(path, "tokenizer config") if path.is_file() else None
        if isinstance(config, dict) and (token := _content(config.get("eos_token"))):
            return token
    return None


def _content(token: Any) -> str | None:
    """A token's text; transformers writes the text alone, or an object with the token's flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def require_same_encoding(directory: Path, other: Path, fix: str) -> None:
    """Raise DataError, ending in `fix`, if two tokenizer directories encode text differently, or one is missing."""
    if encoding_of(load_tokenizer(directory)) != encoding_of(load_tokenizer(other)):
        raise DataError(f"{directory / TOKENIZER_FILE}: gives other ids than {other / TOKENIZER_FILE}. {fix}")


def encoding_of(tokenizer: Any) -> list[Any]:
    """What determines the ids of a `tokenizers.Tokenizer`: model, added tokens, normalizer and pre-tokenizer."""
    body = json.loads(tokenizer.to_str())  # as this version writes it, whichever version wrote the file
    return [body[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")]


def copy_tokenizer(source: Path, target: Path, eos_id: int) -> None:
    """Copy a tokenizer's Hugging Face files into `target`, and no other files of `source`.

    Args:
        source: of the shards.
        target: created if missing.
        eos_id: the token that ends a document there; the copy names it. In shards of earlier versions it was
            `<|endoftext|>`, whatever their tokenizer's configuration says.

    Raises DataError when `source` contains no tokenizer.
    """
    target.mkdir(exist_ok=True)
    for name, data in tokenizer_files(source, load_tokenizer(source).id_to_token(eos_id)).items():
        write_atomically(target / name, data)


def tokenizer_files(directory: Path, eos_token: str | None = None) -> dict[str, bytes]:
    """The Hugging Face files of a tokenizer directory: name -> content.

    With `eos_token`, their configuration names this token as the one that ends a document, so that the copy needs no
    `--eos`. Raises DataError when there is no tokenizer.
    """
    names = (CONFIG_FILE, SPECIAL_TOKENS_FILE)
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    if eos_token not in (None, configured_end_token(directory) or EOS_TOKEN):
        config = read_json(directory / CONFIG_FILE, "tokenizer config") if CONFIG_FILE in files else {}
        files[CONFIG_FILE] = dump_json({**config, "eos_token": eos_token})
        if SPECIAL_TOKENS_FILE in files:
            special = read_json(directory / SPECIAL_TOKENS_FILE, "tokenizer config")
            files[SPECIAL_TOKENS_FILE] = dump_json({**special, "eos_token": eos_token})
    return {TOKENIZER_FILE: tokenizer_json(directory), **files}

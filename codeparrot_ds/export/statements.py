"""Facts that a Hugging Face directory states more than once: context, vocabulary, special tokens, dtype.

Libraries read different files, so two statements that disagree make one model behave differently in different programs.
"""

import re
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import DataError
from codeparrot_ds.export.written import WrittenWeights
from codeparrot_ds.system.files import read_json
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_UNLIMITED = 1e20  # transformers writes 1e30 as `model_max_length` of a tokenizer without a limit
_BLOCK = re.compile(r"(?:transformer\.)?h\.(\d+)\.")
# Encoded both by tokenizer.json itself and by what transformers makes of the directory.
_SAMPLE = 'def f(x: int):\n\tif x >= 10:\r\n        return f"{x}é中🦜"  # don\'t  \n\n\n    return " " * 1234567\n'


class _Statements:
    """What the files of a directory say, by fact: (where, value) of each statement."""

    def __init__(self) -> None:
        self._said: dict[str, list[tuple[str, Any]]] = {}

    def add(self, fact: str, where: str, value: Any) -> None:
        """Record a statement; None is none."""
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        if value is not None:
            self._said.setdefault(fact, []).append((where, value))

    def contradictions(self) -> list[str]:
        """One sentence for each fact on which the files disagree."""
        return [
            f"{fact}: {', '.join(f'{value!r} in {where}' for where, value in said)}"
            for fact, said in self._said.items()
            if any(value != said[0][1] for _, value in said)
        ]


def find_contradictions(directory: Path) -> list[str]:
    """Compare everything that a converted directory states twice. Returns a sentence for each contradiction.

    Raises DataError when a file is missing or is not what its name says.
    """
    said = _Statements()
    files = {name: _read(directory / name) for name in (CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILE)}
    for name in (GENERATION_CONFIG, SPECIAL_TOKENS):
        files[name] = _read(directory / name) if (directory / name).exists() else {}
    _sizes(said, directory, files)
    _special_tokens(said, files)
    return said.contradictions() + _differences_of_added_tokens(files) + _differences_of_tokenizers(directory)


def _read(path: Path) -> dict[str, Any]:
    body = read_json(path, "file of a Hugging Face directory")
    if not isinstance(body, dict):
        raise DataError(f"{path}: not a JSON object.")
    return body


def _sizes(said: _Statements, directory: Path, files: dict[str, dict[str, Any]]) -> None:
    config, tokenizer = files[CONFIG], files[TOKENIZER_FILE]
    weights = WrittenWeights(directory)
    shapes = {name: weights.shape(name) for name in sorted(weights.names)}
    positions = shapes.get("transformer.wpe.weight", [None, None])
    embedding = shapes.get("transformer.wte.weight", [None, None])

    for key in ("n_positions", "n_ctx", "max_position_embeddings"):
        said.add("context (tokens)", f"{CONFIG} ({key})", config.get(key))
    said.add("context (tokens)", "transformer.wpe.weight", positions[0])
    limit = files[TOKENIZER_CONFIG].get("model_max_length")
    if not (isinstance(limit, int | float) and limit > _UNLIMITED):
        said.add("context (tokens)", f"{TOKENIZER_CONFIG} (model_max_length)", limit)
    truncation = tokenizer.get("truncation") or {}
    said.add("context (tokens)", f"{TOKENIZER_FILE} (truncation)", truncation.get("max_length"))

    said.add("vocabulary size", f"{CONFIG} (vocab_size)", config.get("vocab_size"))
    said.add("vocabulary size", "transformer.wte.weight", embedding[0])
    ids = list(_ids(tokenizer).values())
    said.add("vocabulary size", f"{TOKENIZER_FILE} (largest id + 1)", max(ids) + 1 if ids else None)

    for key in ("n_embd", "hidden_size"):
        said.add("hidden size", f"{CONFIG} ({key})", config.get(key))
    said.add("hidden size", "transformer.wte.weight", embedding[1])
    for key in ("n_layer", "num_hidden_layers"):
        said.add("layers", f"{CONFIG} ({key})", config.get(key))
    said.add("layers", "the tensors", len({match[1] for name in shapes if (match := _BLOCK.match(name))}) or None)

    for key in ("dtype", "torch_dtype"):  # the second is the older name
        said.add("dtype", f"{CONFIG} ({key})", str(config[key]).removeprefix("torch.") if key in config else None)
    for dtype in sorted({str(weights.dtype(name)).removeprefix("torch.") for name in shapes}):
        said.add("dtype", "the tensors", dtype)
    said.add("tied embeddings", f"{CONFIG} (tie_word_embeddings)", config.get("tie_word_embeddings", True))
    said.add("tied embeddings", "the tensors", "lm_head.weight" not in shapes)


def _special_tokens(said: _Statements, files: dict[str, dict[str, Any]]) -> None:
    ids = _ids(files[TOKENIZER_FILE])
    for token in ("bos", "eos", "pad", "unk"):
        for name in (CONFIG, GENERATION_CONFIG):
            said.add(f"id of the {token} token", f"{name} ({token}_token_id)", files[name].get(f"{token}_token_id"))
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
            content = files[name].get(f"{token}_token")
            if isinstance(content, dict):
                content = content.get("content")
            if content is not None:
                said.add(
                    f"id of the {token} token",
                    f"{name} ({token}_token {content!r})",
                    ids.get(content, f"no id in {TOKENIZER_FILE}"),
                )


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Token -> id, of the vocabulary and the added tokens in a tokenizer.json."""
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):  # Unigram: [token, score]
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    return {**vocab, **{added["content"]: added["id"] for added in tokenizer.get("added_tokens") or []}}


def _differences_of_added_tokens(files: dict[str, dict[str, Any]]) -> list[str]:
    """Compare the added tokens in tokenizer_config.json, which override those in tokenizer.json."""
    added = {token["id"]: token for token in files[TOKENIZER_FILE].get("added_tokens") or []}
    problems = []
    for key, token in (files[TOKENIZER_CONFIG].get("added_tokens_decoder") or {}).items():
        other = added.get(int(key), {})
        differing = [name for name in token if name in other and token[name] != other[name]]
        if not other or differing:
            problems.append(
                f"added token {key}: {token.get('content')!r} in {TOKENIZER_CONFIG} differs from {TOKENIZER_FILE} "
                f"({', '.join(differing) or 'which has none of this id'})"
            )
    return problems


def _differences_of_tokenizers(directory: Path) -> list[str]:
    """Compare the ids of tokenizer.json with those of the tokenizer that transformers makes of the directory."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    own = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    own.no_truncation()
    try:
        theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # of many libraries
        return [f"transformers cannot load the tokenizer ({' '.join(str(error).split())[:200]})"]
    texts = [_SAMPLE, *(f"x = '{token}'" for token in list(theirs.get_added_vocab())[:20])]
    return [
        f"{TOKENIZER_FILE} and transformers' tokenizer give different ids for {text[:40]!a}"
        for text in texts
        if own.encode(text, add_special_tokens=False).ids
        != theirs.encode(text, add_special_tokens=False, verbose=False)
    ][:1]

"""The components of a `tokenizer.json`, and what they do to a text apart from splitting it."""

import json
from dataclasses import dataclass
from typing import Any

BLANK = "\u2581"  # how SentencePiece writes a blank inside a token
STRIPPING = ("lstrip", "rstrip")
# Components that lose text whatever their settings: type -> how.
_LOSSY = {
    "Lowercase": "makes capital letters small",
    "StripAccents": "removes accents",
    "Strip": "removes white space at the ends of a document",
    "NFKC": "replaces characters by similar ones",
    "NFKD": "replaces characters by similar ones",
    "Nmt": "removes control characters and replaces white space",
    "Precompiled": "replaces characters by similar ones",
    "BertNormalizer": "removes control characters and replaces white space",
    "Whitespace": "removes white space, line ends included",
    "WhitespaceSplit": "removes white space, line ends included",
    "BertPreTokenizer": "removes white space, line ends included",
    "CharDelimiterSplit": "removes its delimiter",
    "WordLevel": "has no tokens for words outside its vocabulary",
    "WordPiece": "has no tokens for words outside its vocabulary",
}


@dataclass(frozen=True)
class Parts:
    """The components that a text passes through, in this order. Sequences are flattened.

    Each is an object of `tokenizer.json`; the model includes vocabulary and merges.
    """

    added_tokens: list[dict[str, Any]]
    normalizers: list[dict[str, Any]]
    pre_tokenizers: list[dict[str, Any]]
    model: dict[str, Any]

    @classmethod
    def parse(cls, tokenizer_json: str) -> "Parts":
        """Read the components of a tokenizer that the `tokenizers` library has loaded and serialized."""
        content = json.loads(tokenizer_json)
        return cls(
            content["added_tokens"] or [],
            _flatten(content["normalizer"]),
            _flatten(content["pre_tokenizer"]),
            content["model"],
        )

    @property
    def matched_tokens(self) -> list[dict[str, Any]]:
        """Added tokens that are recognized in a document. Special ones are not: there, they are text."""
        return [token for token in self.added_tokens if not token["special"]]

    @property
    def canonical(self) -> bool:
        """Whether texts are brought into a canonical form of Unicode."""
        return any(part["type"] in ("NFC", "NFD") for part in self.normalizers)

    @property
    def marks_blanks(self) -> bool:
        """Whether a blank is encoded as U+2581, so that U+2581 itself becomes a blank."""
        return any(part["type"] == "Metaspace" for part in self.pre_tokenizers) or any(map(_marks, self.normalizers))

    @property
    def prefixes_blank(self) -> bool:
        """Whether a blank is put before a document that does not begin with one."""
        return any(part["type"] == "Prepend" for part in self.normalizers) or any(
            part.get("add_prefix_space") or part.get("prepend_scheme", "never") != "never"
            for part in self.pre_tokenizers
        )


def _flatten(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [each for inner in part.get("normalizers") or part.get("pretokenizers") or [] for each in _flatten(inner)]


def _marks(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, BLANK)


def refused_settings(parts: Parts, eos_token: str) -> list[str]:
    """Settings that make encoding random or lose text, one sentence each, without a full stop.

    Args:
        parts: the tokenizer's components.
        eos_token: the token that ends a document.
    """
    problems = []
    if dropout := parts.model.get("dropout"):
        problems.append(f"model: dropout {dropout:g} encodes the same text differently each time. Set it to null")
    for kind, components in (("normalizer", parts.normalizers), ("pre-tokenizer", parts.pre_tokenizers)):
        problems += [f"{kind} {part['type']}: {how}" for part in components if (how := _loss(part))]
    if how := _loss(parts.model):
        problems.append(f"model {parts.model['type']}: {how}")
    problems += [
        f"added token {eos_token}: not special, so that this text in a document would end it. Set `special` to true"
        for token in parts.matched_tokens
        if token["content"] == eos_token
    ]
    return problems


def _loss(part: dict[str, Any]) -> str | None:
    """How this component loses text, as far as its settings alone tell."""
    if part["type"] == "Replace" and not _marks(part):
        (pattern,) = part["pattern"].values()
        return f"replaces {pattern!a} by {part['content']!a}"
    if part["type"] == "Prepend" and part["prepend"] != BLANK:
        return f"puts {part['prepend']!a} before every document"
    if part.get("behavior") == "Removed":
        (pattern,) = part.get("pattern", {"": "punctuation"}).values()
        return f"removes {'all but ' if part.get('invert') else ''}{pattern!a}"
    return _LOSSY.get(part["type"])


def accepted_changes(parts: Parts) -> list[str]:
    """Changes of the text that common tokenizers make and that are accepted, one sentence each.

    Two texts that differ only in this way may get the same ids.
    """
    changes = [
        f"texts are normalized to {part['type']}" for part in parts.normalizers if part["type"] in ("NFC", "NFD")
    ]
    if parts.prefixes_blank:
        changes.append("a blank is put before a document that does not begin with one")
    if parts.marks_blanks:
        changes.append("U+2581 becomes a blank")
    for side, where in zip(STRIPPING, ("before", "after"), strict=True):
        stripping = [token["content"] for token in parts.matched_tokens if token[side]]
        if stripping:
            changes.append(f"white space {where} {', '.join(map(ascii, sorted(stripping)))} is removed ({side})")
    return changes


def config_conflicts(parts: Parts, config: Any) -> list[str]:
    """Settings of `tokenizer_config.json` with which transformers would encode differently, one sentence each."""
    if not isinstance(config, dict) or not isinstance(config.get("added_tokens_decoder") or {}, dict):
        return ["tokenizer_config.json is not a tokenizer's configuration"]
    problems = []
    added = {token["id"]: token["content"] for token in parts.added_tokens}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        content = token.get("content") if isinstance(token, dict) else token
        if not str(number).isdecimal() or added.get(int(number)) != content:
            problems.append(f"tokenizer_config.json has {content!a} as added token {number}, tokenizer.json does not")
    byte_level = [part["add_prefix_space"] for part in parts.pre_tokenizers if part["type"] == "ByteLevel"]
    wanted = config.get("add_prefix_space")
    if wanted is not None and byte_level and bool(wanted) != any(byte_level):
        problems.append(
            f"add_prefix_space is {bool(wanted)} in tokenizer_config.json and {any(byte_level)} in tokenizer.json"
        )
    return problems

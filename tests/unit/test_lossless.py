"""Shards are built only with tokenizers whose ids determine the text; what encodes at random or loses text is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from codeparrot_ds.errors import DataError
from codeparrot_ds.shards.build import build
from codeparrot_ds.shards.format import Manifest, read_index
from codeparrot_ds.shards.options import BuildOptions
from codeparrot_ds.tokenizer.directory import EOS_TOKEN
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.lossless import require_lossless
from tests.tokenizer_kinds import BYTES, added_token, only_bytes, save, unigram

EOS = added_token(EOS_TOKEN, 0, special=True)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def shards_of(tmp_path: Path, tokenizer: Tokenizer, texts: list[str], encoder: str = "tokenizers") -> Manifest:
    """Build shards of `texts` and enough others for a validation split."""
    rows = [{"content": text} for text in [*texts, *(f"filler {n}" for n in range(20))]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = build(
        str(tmp_path / "in.jsonl"),
        save(tokenizer, tmp_path / "tokenizer"),
        tmp_path / "shards",
        BuildOptions(valid_fraction=0.3, workers=1, encoder=encoder),
    )
    assert manifest is not None
    return manifest


def documents_of(manifest: Manifest) -> list[list[int]]:
    """The ids of every document, without the end token."""
    found = []
    for shard in manifest.shards:
        index = read_index(manifest.path(shard, ".idx"))
        ids = np.fromfile(manifest.path(shard, ".bin"), index.dtype)
        found += [part.tolist()[:-1] for part in np.split(ids, np.cumsum(index.lengths)[:-1])]
    return found


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({EOS_TOKEN: 0, "<unk>": 1, "def": 2, "\n": 3}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({EOS_TOKEN: 0, "[UNK]": 1, "def": 2}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def sequence(*components: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(components)}


def pre(*components: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [*components, BYTE_LEVEL]}


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": r"\n+"}, "behavior": behavior, "invert": False}


BERT = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": False,
}
REFUSED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "dropout": (lambda: only_bytes(model={"dropout": 0.1}), r"model: dropout 0\.1 encodes the same text differently"),
    "rare dropout": (lambda: only_bytes(model={"dropout": 1e-6}), "dropout 1e-06"),
    "certain dropout": (lambda: only_bytes(model={"dropout": 1.0}), "dropout 1 "),
    "capitals": (lambda: only_bytes(normalizer={"type": "Lowercase"}), "normalizer Lowercase: makes capital"),
    "compatibility": (lambda: only_bytes(normalizer=sequence({"type": "NFC"}, {"type": "NFKC"})), "normalizer NFKC"),
    "accents": (lambda: only_bytes(normalizer=sequence({"type": "NFD"}, {"type": "StripAccents"})), "StripAccents"),
    "ends": (lambda: only_bytes(normalizer={"type": "Strip", "strip_left": False, "strip_right": True}), "Strip"),
    "controls": (lambda: only_bytes(normalizer=BERT), "BertNormalizer: removes control"),
    "carriage returns": (lambda: only_bytes(normalizer=replace("\r\n", "\n")), r"replaces '\\r\\n' by '\\n'"),
    "tabs": (lambda: only_bytes(normalizer=replace("\t", "    ")), r"replaces '\\t' by '    '"),
    "white space": (lambda: only_bytes(pre_tokenizer=pre({"type": "WhitespaceSplit"})), "WhitespaceSplit: removes"),
    "words": (lambda: only_bytes(pre_tokenizer=pre({"type": "BertPreTokenizer"})), "BertPreTokenizer: removes"),
    "delimiter": (
        lambda: only_bytes(pre_tokenizer=pre({"type": "CharDelimiterSplit", "delimiter": "\n"})),
        "CharDelimiterSplit: removes its delimiter",
    ),
    "line ends": (lambda: only_bytes(pre_tokenizer=pre(split("Removed"))), r"Split: removes '\\\\n\+'"),
    "word list": (word_level, "model WordLevel: has no tokens for words outside its vocabulary"),
    "word pieces": (word_piece, "model WordPiece"),
    "end token": (
        lambda: only_bytes(added_tokens=[added_token(EOS_TOKEN, 0)]),
        r"<\|endoftext\|>: not special, so that this text in a document would end it. Set `special` to true",
    ),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_are_random_or_lose_text_are_refused_by_name(tmp_path: Path, setting: str) -> None:
    make, message = REFUSED[setting]
    with pytest.raises(DataError, match=message) as caught:
        shards_of(tmp_path, make(), ["def f():\n\treturn 1\n"])
    assert str(tmp_path / "tokenizer" / "tokenizer.json") in str(caught.value)
    assert not (tmp_path / "shards").exists()


def test_all_refused_settings_are_named_at_once(tmp_path: Path) -> None:
    tokenizer = only_bytes(
        model={"dropout": 0.5}, normalizer={"type": "Lowercase"}, pre_tokenizer=pre(split("Removed"))
    )
    with pytest.raises(DataError, match=r"3 problems\n.*dropout.*\n.*Lowercase.*\n.*Split"):
        shards_of(tmp_path, tokenizer, ["x"])


def characters(unknown: str | None) -> Tokenizer:
    """A token for each printable ASCII character, and none for a line end. Without a byte level."""
    vocabulary = {EOS_TOKEN: 0, "<unk>": 1, **{chr(c): c for c in range(32, 127)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def without_bytes(*tokens: str) -> Tokenizer:
    """A byte-level vocabulary without `tokens`, as trained without an initial alphabet."""
    vocabulary = json.loads(only_bytes().to_str())["model"]["vocab"]
    return only_bytes(model={"vocab": {token: i for token, i in vocabulary.items() if token not in tokens}})


def some_byte_fallback(missing: str) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate([EOS_TOKEN, *BYTES]) if token != missing}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


LOST: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "no token for a line end": (lambda: characters(None), r"BPE without unk_token .* drops, '\\t', '\\n', '\\x0b'"),
    "unknown token for a line end": (lambda: characters("<unk>"), r"encodes as <unk>, '\\t', '\\n', '\\x0b'"),
    "no token for the byte of q": (
        lambda: without_bytes("q"),
        "BPE without unk_token .* drops, 'q'",
    ),
    "no token for a continuation byte": (lambda: without_bytes("©"), r"drops, '\\xa9', '\\xe9'"),  # é is C3 A9
    "no token for the lead byte of emoji": (lambda: without_bytes("ð"), r"drops, '\\U000100"),  # F0
    "byte fallback without the line end": (lambda: some_byte_fallback("<0x0A>"), r"'\\n'"),
    "unigram without byte fallback": (
        lambda: unigram(byte_fallback=False),
        r"encodes as <unk>, '\\t', '\\x0b', '\\x0c', '\\r'",
    ),
    "no decoder": (lambda: only_bytes(decoder=None), "normalizer or decoder does not restore"),
    "a blank before every word": (
        lambda: only_bytes(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [split("Isolated"), {**BYTE_LEVEL, "add_prefix_space": True}],
            }
        ),
        r"does not restore .*\\n",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_text_that_is_lost_is_named(tmp_path: Path, what: str) -> None:
    make, message = LOST[what]
    with pytest.raises(DataError, match=message):
        shards_of(tmp_path, make(), ["x"])
    assert not (tmp_path / "shards").exists()


def end_token_as_a_word() -> Tokenizer:
    """The end token is an entry of the vocabulary that `ignore_merges` takes for the word <|endoftext|>."""
    words = {"type": "Split", "pattern": {"Regex": r"\S+|\s+"}, "behavior": "Isolated", "invert": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [words, {**BYTE_LEVEL, "use_regex": False}]}
    return only_bytes(model={"ignore_merges": True}, pre_tokenizer=pre_tokenizer, added_tokens=[])


@pytest.mark.parametrize("special", [True, False])
def test_an_end_token_that_a_text_may_contain_is_refused(tmp_path: Path, special: bool) -> None:
    tokenizer = end_token_as_a_word()
    if special:
        tokenizer.add_special_tokens([EOS_TOKEN])
    with pytest.raises(DataError, match=r"the text <\|endoftext\|> in a document becomes the end token \(id 0\)"):
        shards_of(tmp_path, tokenizer, ["x"])


# Each with the ids of "é \n" (bytes C3 A9 20 0A, plus 1) and what is said about it.
ACCEPTED: dict[str, tuple[Tokenizer, list[int], list[str]]] = {
    "bytes": (only_bytes(), [0xC4, 0xAA, 0x21, 0x0B], []),
    "NFC": (only_bytes(normalizer={"type": "NFC"}), [0xC4, 0xAA, 0x21, 0x0B], ["texts are normalized to NFC"]),
    "NFD": (  # e is 65, the acute accent CC 81
        only_bytes(normalizer={"type": "NFD"}),
        [0x66, 0xCD, 0x82, 0x21, 0x0B],
        ["texts are normalized to NFD"],
    ),
    "prefix space": (
        only_bytes(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}),
        [0x21, 0xC4, 0xAA, 0x21, 0x0B],
        ["a blank is put before a document that does not begin with one"],
    ),
    "isolated line ends": (only_bytes(pre_tokenizer=pre(split("Isolated"))), [0xC4, 0xAA, 0x21, 0x0B], []),
    "no dropout": (only_bytes(model={"dropout": 0.0}), [0xC4, 0xAA, 0x21, 0x0B], []),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted_changes_are_said_and_recorded(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, ids, changes = ACCEPTED[kind]
    manifest = shards_of(tmp_path, tokenizer, ["é \n"])
    assert ids in documents_of(manifest)
    assert manifest.options.get("text_changes", []) == changes
    assert all(change in capsys.readouterr().err for change in changes)
    assert Manifest.read(tmp_path / "shards").options == manifest.options


# "<x>" is the bytes 3C 78 3E; as an added token it has id 257. ids of "a <x>b" (61 20 3C 78 3E 62, plus 1).
FLAGS = {
    "none": ({}, [0x62, 0x21, 257, 0x63]),
    "single_word": ({"single_word": True}, [0x62, 0x21, 0x3D, 0x79, 0x3F, 0x63]),
    "lstrip": ({"lstrip": True}, [0x62, 257, 0x63]),
    "rstrip": ({"rstrip": True}, [0x62, 0x21, 257, 0x63]),
    "normalized": ({"normalized": True}, [0x62, 0x21, 257, 0x63]),
    "special": ({"special": True, "lstrip": True}, [0x62, 0x21, 0x3D, 0x79, 0x3F, 0x63]),  # then it is text
}


@pytest.mark.parametrize("flag", FLAGS)
def test_added_tokens_are_matched_by_the_rules_of_tokenizers(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags, ids = FLAGS[flag]
    tokenizer = only_bytes(added_tokens=[EOS, added_token("<x>", 257, **flags)])
    by_name = flag in ("single_word", "lstrip", "rstrip")
    manifest = shards_of(tmp_path, tokenizer, ["a <x>b"], encoder="auto" if by_name else "tokenizers")
    assert ids in documents_of(manifest)
    said = capsys.readouterr().err
    assert (f"encoding with tokenizers, because the added token '<x>' is matched by the rule {flag}" in said) == by_name
    assert ("white space before '<x>' is removed (lstrip)" in said) == (flag == "lstrip")


CONFLICTS: dict[str, tuple[Any, str | None]] = {
    "no settings": ({}, None),
    "the same": ({"add_prefix_space": False, "added_tokens_decoder": {"0": {"content": EOS_TOKEN}}}, None),
    "no prefix either": ({"add_prefix_space": None, "added_tokens_decoder": None}, None),
    "another prefix": ({"add_prefix_space": True}, "add_prefix_space is True in tokenizer_config.json and False in"),
    "another token": ({"added_tokens_decoder": {"257": {"content": "ABC"}}}, "has 'ABC' as added token 257, tokenizer"),
    "another id": ({"added_tokens_decoder": {"1": {"content": EOS_TOKEN}}}, "as added token 1, tokenizer"),
    "another content": ({"added_tokens_decoder": {"0": {"content": "</s>"}}}, "has '</s>' as added token 0, tokenizer"),
    "no number": ({"added_tokens_decoder": {"x": {"content": EOS_TOKEN}}}, "as added token x, tokenizer"),
    "a list": ([], "not a tokenizer's configuration"),
    "a list of tokens": ({"added_tokens_decoder": [1]}, "not a tokenizer's configuration"),
}


@pytest.mark.parametrize("what", CONFLICTS)
def test_settings_that_make_transformers_encode_differently_are_refused(tmp_path: Path, what: str) -> None:
    """Otherwise a model would be used with other ids than it was trained on."""
    config, message = CONFLICTS[what]
    directory = save(only_bytes(), tmp_path)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if message is None:
        assert require_lossless(Encoder(directory), directory) == []
        return
    with pytest.raises(DataError, match=message):
        require_lossless(Encoder(directory), directory)


def test_a_text_on_which_the_library_panics_is_an_error_of_the_user(tmp_path: Path) -> None:
    """`tokenizers` panics where two added tokens strip the same white space."""
    added = [added_token("\n", 257, lstrip=True), added_token("<x>", 258, lstrip=True, rstrip=True)]
    encoder = Encoder(save(only_bytes(added_tokens=[EOS, *added]), tmp_path))
    with pytest.raises(DataError, match=r"^tokenizers .* failed on a text .* remove lstrip and rstrip"):
        encoder.encode("<x><x><x>\n ")


def test_every_component_of_the_library_has_been_judged() -> None:
    """A release with a new component fails here: decide in `parts.py` whether it loses text."""
    judged = {
        normalizers: {
            *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"),
            *("Prepend", "Replace", "Sequence", "Strip", "StripAccents"),
        },
        pre_tokenizers: {
            *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace"),
            *("Punctuation", "Sequence", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
        },
        models: {"BPE", "Unigram", "WordLevel", "WordPiece"},
    }
    for module, names in judged.items():
        (base,) = {"Normalizer", "PreTokenizer", "Model"} & set(dir(module))
        classes = {name for name, found in vars(module).items() if isinstance(found, type)} - {base}
        assert {name for name in classes if issubclass(vars(module)[name], vars(module)[base])} == names

"""Tokenizers of many kinds, and texts to compare encoders on that are made independently of the proof's own cases."""

import json
import re
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from codeparrot_ds.tokenizer.directory import EOS_TOKEN, TOKENIZER_FILE

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = [  # in sequence
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ\u30a0-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
ADDED = ("<x>", "<x>y", "def", "    ", "é", "e\u0301x", "<|fim_prefix|>", "A")
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


def sources(*packages: str) -> list[str]:
    """Source files of packages of the standard library."""
    return [
        path.read_text(errors="ignore")
        for package in packages
        for path in sorted((_STANDARD_LIBRARY / package).glob("*.py"))
    ]


def split_by(*patterns: str, prefix: bool = False) -> Any:
    """Byte-level pre-tokenizer that splits by regular expressions, in sequence; by GPT-2's without any."""
    if not patterns:
        return pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)])


def byte_level(pre_tokenizer: Any, normalizer: Any = None, added: Sequence[AddedToken] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer of 1,000 tokens and the `added` ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources("json", "http"), trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def change(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    """The tokenizer with parts of its `tokenizer.json` replaced; of `model`, only the given settings."""
    content = json.loads(tokenizer.to_str())
    content["model"] |= parts.pop("model", {})
    return Tokenizer.from_str(json.dumps(content | parts))


def only_bytes(**parts: Any) -> Tokenizer:
    """A byte-level tokenizer without merges: the end token is id 0, byte b is id b + 1, the first added token 257."""
    alphabet = {pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(b))[0][0]: b for b in range(128)}
    encode = {byte: c for c, byte in alphabet.items()}
    rest = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in alphabet]
    latin = [c for c in rest if 0xA1 <= ord(c) <= 0xFF]  # these bytes stand for themselves
    encode |= {ord(c): c for c in latin}
    others = [c for c in rest if c not in latin]
    encode |= dict(zip([b for b in range(128, 256) if b not in encode], others, strict=True))
    vocabulary = {EOS_TOKEN: 0, **{encode[byte]: byte + 1 for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = split_by(), decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TOKEN])
    return change(tokenizer, **parts)


def added_token(content: str, token_id: int, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens` in `tokenizer.json`, with all flags false but the given."""
    return {"id": token_id, "content": content, **dict.fromkeys((*FLAGS, "special"), False), **flags}


def _words(size: int) -> Tokenizer:
    """A vocabulary of `size` tokens without training: each frequent word is merged from left to right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([EOS_TOKEN, *alphabet])}
    merges: list[tuple[str, str]] = []
    texts = sources("asyncio", "email", "json", "unittest", "idlelib", "distutils", "lib2to3", "test")
    found = (re.findall(r" ?[A-Za-z]+| ?[!-@\[-`{-~]+|\n+| +", text[:60_000]) for text in texts)
    words = Counter(word.replace(" ", "Ġ").replace("\n", "Ċ") for each in found for word in each)
    for word, _ in words.most_common():
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary and len(vocabulary) < size:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    assert len(vocabulary) == size, f"only {len(vocabulary)} tokens"
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split_by(LLAMA_3), decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def _sentencepiece_bpe() -> Tokenizer:
    """Like Llama 2: blanks become U+2581, one is put first, and unknown characters are encoded as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=1000, max_token_length=12, special_tokens=[EOS_TOKEN, *BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(sources("json"), trainer)
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    content = json.loads(tokenizer.to_str())
    return change(
        tokenizer,
        model={"byte_fallback": True, "fuse_unk": True},
        added_tokens=content["added_tokens"][:1],
        decoder=json.loads(decoder.__getstate__()),
    )


def unigram(byte_fallback: bool = True) -> Tokenizer:
    """A SentencePiece unigram tokenizer; without `byte_fallback`, unknown characters become <unk>."""
    pieces = [(chr(c), -6.0) for c in range(33, 127)] + [("▁", -3.0), ("\n", -3.0), ("▁▁▁▁", -3.5), ("self", -5.0)]
    vocabulary = [(EOS_TOKEN, -1e6), ("<unk>", 0.0), *((byte, -20.0) for byte in BYTES), *pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 1, byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def _flagged(special: bool) -> list[AddedToken]:
    """Added tokens with every flag alone, with two of them, and with none."""
    flags = [{}, *({flag: True} for flag in FLAGS), {"lstrip": True, "rstrip": True}, {"single_word": True}, {}]
    return [
        AddedToken(content, **{"normalized": False, **its}, special=special)
        for content, its in zip(ADDED, flags, strict=True)
    ]


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(split_by()),
    "qwen-nfc": lambda: byte_level(split_by(QWEN), normalizers.NFC()),
    "llama3": lambda: change(byte_level(split_by(LLAMA_3)), model={"ignore_merges": True}),
    "o200k": lambda: byte_level(split_by(O200K)),
    "deepseek": lambda: byte_level(split_by(*DEEPSEEK)),
    "digits": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), split_by()])),
    "prefix-space": lambda: byte_level(split_by(prefix=True)),
    "added": lambda: byte_level(split_by(), None, [AddedToken(each, normalized=False) for each in ADDED]),
    "added-nfc": lambda: byte_level(
        split_by(QWEN), normalizers.NFC(), [AddedToken(each, normalized=True) for each in ADDED]
    ),
    "special-flags": lambda: byte_level(split_by(), None, _flagged(special=True)),
    "sentencepiece-bpe": _sentencepiece_bpe,
    "70k": lambda: _words(70_000),
    "every-flag": lambda: byte_level(split_by(QWEN), normalizers.NFC(), _flagged(special=False)),
    "nfd": lambda: byte_level(split_by(), normalizers.NFD()),
    "unigram": unigram,
}


def save(tokenizer: Tokenizer, directory: Path) -> Path:
    """Write `tokenizer.json` into `directory`, which is created."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / TOKENIZER_FILE))
    return directory


RUNS = [*" \n\t\r0aZ=_'é中🦜", "\r\n", " \n", "e\u0301", "'s", "\u0301", "\u212b", "가", "\u1100\u1161\u11a8", "٣"]
RARE = " \n\t\r\x0b\x1c\x85\u00a0\u2028\u3000aZ09'_./-éÅ\u0301\u0327\u093f中ひ٣²Ⅷ🦜\u200d\u017f\u212aǅ\u0378\ue000▁"


class Fuzzer:
    """Makes texts of source lines, damaged lines, runs, random Unicode, and added tokens glued together and altered."""

    def __init__(self, tokenizer: Tokenizer, seed: str) -> None:
        self._random = Random(seed)
        self._lines = [line for text in sources("json", "xml/dom", "http") for line in text.splitlines(True)]
        content = json.loads(tokenizer.to_str())
        self._added = [token["content"] for token in content["added_tokens"]]
        self._parts = [self._line, self._line, self._line, self._damaged, self._run, self._unicode, self._rare]
        self._parts += [self._glued, self._altered]

    def text(self) -> str:
        """One text, of 4 to 19 parts."""
        return "".join(self._random.choice(self._parts)() for _ in range(self._random.randrange(4, 20)))

    def _line(self) -> str:
        return self._random.choice(self._lines)

    def _damaged(self) -> str:
        line = bytearray(self._line().encode())
        for _ in range(3):
            line[self._random.randrange(len(line))] = self._random.randrange(256)
        return line.decode(errors="replace")

    def _run(self) -> str:
        return self._random.choice(RUNS) * self._random.randrange(1, 100)

    def _unicode(self) -> str:
        drawn = (self._random.randrange(0x110000) for _ in range(self._random.randrange(1, 9)))
        return "".join(chr(c) for c in drawn if not 0xD800 <= c < 0xE000)

    def _rare(self) -> str:
        return "".join(self._random.choices(RARE, k=self._random.randrange(1, 30)))

    def _glued(self) -> str:
        return "".join(self._random.choices([*self._added, "", " ", "\n"], k=self._random.randrange(1, 6)))

    def _altered(self) -> str:
        content = self._random.choice(self._added)
        forms = [content.upper(), content[:-1], content[1:], unicodedata.normalize("NFD", content), content + "\u0301"]
        forms += [f"{before}{content}{after}" for before in ("a", "_", "7", "  ", "\t") for after in ("b", " ", "\n")]
        return self._random.choice(forms)

"""The chosen encoder gives the ids of `tokenizers` for fuzzed texts, whatever the kind of tokenizer."""

import statistics
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from codeparrot_ds.tokenizer import cases
from codeparrot_ds.tokenizer.directory import TOKENIZER_FILE
from codeparrot_ds.tokenizer.encode import Encoder, FastEncoder
from codeparrot_ds.tokenizer.proof import choose_encoder
from tests.conftest import once
from tests.tokenizer_kinds import KINDS, Fuzzer, save

# Encoded by `tokenizers`; deepseek, because fastokens takes U+180E for white space there. All others by fastokens.
SLOW_KINDS = {"every-flag", "nfd", "unigram", "deepseek"}
CI_KINDS = ("llama3", "qwen-nfc", "added", "every-flag")  # the others at night
CI_TEXTS = 100  # of each kind
NIGHTLY_TEXTS = 100_000  # of all kinds together, at least
_BATCH = 100  # texts


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each kind of tokenizer."""

    def make(root: Path) -> None:
        for name, build in KINDS.items():
            save(build(), root / name)

    return once(tmp_path_factory, "tokenizer_kinds", make)


def require_equal_on_fuzzed_texts(directory: Path, name: str, count: int) -> list[int]:
    """Compare the encoder that a build would choose with `tokenizers`; returns the lengths of the texts."""
    referee = Encoder(directory)
    chosen = choose_encoder(directory, referee, "auto", [])
    assert chosen == ("tokenizers" if name in SLOW_KINDS else "fastokens"), name
    encoder = FastEncoder(directory) if chosen == "fastokens" else Encoder(directory)
    fuzzer = Fuzzer(Tokenizer.from_file(str(directory / TOKENIZER_FILE)), f"{name} {count}")
    lengths: list[int] = []
    while len(lengths) < count:
        texts = [fuzzer.text() for _ in range(min(_BATCH, count - len(lengths)))]
        ids, ends = encoder.encode_flat(texts)
        expected, expected_ends = referee.encode_flat(texts)
        if not np.array_equal(ids, expected) or not np.array_equal(ends, expected_ends):
            differing = [text for text in texts if not np.array_equal(encoder.encode(text), referee.encode(text))]
            pytest.fail(f"{name}: {len(differing)} of {len(texts)} texts differ, e.g. {min(differing, key=len)!a}")
        assert referee.eos_id not in expected
        lengths += map(len, texts)
    return lengths


def test_twelve_kinds_of_tokenizer_eight_of_them_on_the_fast_encoder() -> None:
    assert len(KINDS) >= 12
    assert len(KINDS.keys() - SLOW_KINDS) >= 8


@pytest.fixture
def short_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The proof without most code points, which take nearly all of its time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cases, "_EVERY_CODE_POINT", range(0x1900))


@pytest.mark.slow
@pytest.mark.usefixtures("short_proof")
@pytest.mark.parametrize("name", CI_KINDS)
def test_fuzzed_texts_get_the_ids_of_tokenizers(kinds: Path, name: str) -> None:
    lengths = require_equal_on_fuzzed_texts(kinds / name, name, CI_TEXTS)
    assert statistics.median(lengths) >= 200


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_fuzzed_texts_get_the_ids_of_tokenizers(
    kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    share = -(-NIGHTLY_TEXTS // len(KINDS))
    lengths = [length for name in KINDS for length in require_equal_on_fuzzed_texts(kinds / name, name, share)]
    assert len(lengths) >= NIGHTLY_TEXTS
    assert statistics.median(lengths) >= 200

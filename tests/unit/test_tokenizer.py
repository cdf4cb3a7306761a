"""Training a tokenizer, exact encoding, and agreement with transformers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeparrot_ds.errors import DataError
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.train import EOS_TOKEN, train
from tests.conftest import VOCAB_SIZE


@pytest.fixture(scope="module")
def encoder(data: Path) -> Encoder:
    return Encoder(data / "tokenizer")


def test_the_end_token_is_id_0_and_all_bytes_are_there(encoder: Encoder) -> None:
    assert encoder.eos_id == 0
    assert encoder.vocab_size == VOCAB_SIZE
    assert all(len(encoder.encode(chr(code))) >= 1 for code in range(1, 0x250))


@settings(deadline=None)
@given(text=st.text())
def test_any_text_round_trips(encoder: Encoder, text: str) -> None:
    ids = encoder.encode(text)
    assert encoder.decode(ids) == text


def test_a_literal_end_token_in_a_document_is_text(encoder: Encoder) -> None:
    ids = encoder.encode(f"a{EOS_TOKEN}b")
    assert encoder.eos_id not in ids
    assert encoder.decode(ids) == f"a{EOS_TOKEN}b"


def test_transformers_reads_it_with_the_same_ids(encoder: Encoder, data: Path) -> None:
    from transformers import AutoTokenizer

    text = "def area(width, height):\n\treturn width * height  # ¬é🦜\n"
    loaded = AutoTokenizer.from_pretrained(data / "tokenizer")
    assert loaded(text).input_ids == encoder.encode(text).tolist()
    assert loaded.decode(loaded("x  ,  y !").input_ids) == "x  ,  y !"
    assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == (EOS_TOKEN, 0, VOCAB_SIZE)


def test_training_twice_gives_the_same_merges(data: Path, tmp_path: Path) -> None:
    again = train(data / "corpus", tmp_path / "tokenizer", VOCAB_SIZE, 32)
    assert again["digest"] == Encoder(data / "tokenizer").digest


def test_too_large_a_vocabulary_is_refused_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too small for 1,000,000 tokens"):
        train(data / "corpus", tmp_path / "tokenizer", 1_000_000)
    assert not (tmp_path / "tokenizer").exists()


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Encoder(tmp_path)
    with pytest.raises(DataError, match="codeparrot-ds tokenizer train"):
        Encoder(tmp_path / "absent")


def test_texts_end_to_end_and_where_they_end(encoder: Encoder) -> None:
    texts = ["def f():", "", "x", "\n\n"]
    ids, ends = encoder.encode_flat(texts)
    assert ids.dtype == np.uint32
    assert [part.tolist() for part in np.split(ids, ends[:-1])] == [encoder.encode(text).tolist() for text in texts]

"""Hashes of words: a function of the word alone, and different for different words."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from codeparrot_ds.corpus.words import hash_words

# Around the 8 bytes that are mixed at a time, and the 64 after which words are hashed one by one.
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 56, 57, 63, 64, 65, 72, 73, 1000)


def alone(word: bytes) -> int:
    hashes, starts = hash_words(word)
    assert starts.tolist() == [0]
    return int(hashes[0])


@given(st.lists(st.sampled_from([b" ", b"a", b"b", b"ab", b"x" * 8, b"y" * 64, b"\xff", b"\x00"])))
def test_words_are_what_bytes_split_finds(parts: list[bytes]) -> None:
    text = b"".join(parts)
    hashes, starts = hash_words(text)
    words = text.split(b" ")
    places = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
    assert starts.tolist() == [int(place) for place, word in zip(places, words, strict=True) if word]
    assert hashes.tolist() == [alone(word) for word in words if word]


def test_a_change_of_any_byte_changes_the_hash() -> None:
    words = {b"x" * size for size in SIZES} | {
        b"x" * at + b"y" + b"x" * (size - 1 - at) for size in SIZES for at in range(size)
    }
    hashes, _ = hash_words(b" ".join(words))
    assert len(set(hashes.tolist())) == len(words)


def test_short_words_and_their_hashes_are_one_to_one() -> None:
    numbers = [b"%d" % i for i in range(100_000)]
    hashes, _ = hash_words(b" ".join(numbers))
    assert len(np.unique(hashes)) == len(numbers)
    # Each bit is set in half of the hashes: MinHash and the table of grams use some of the bits only.
    shares = [float((hashes >> np.uint64(bit) & np.uint64(1)).mean()) for bit in range(64)]
    assert all(abs(share - 0.5) < 0.01 for share in shares)

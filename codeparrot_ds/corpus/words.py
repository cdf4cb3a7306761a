"""The words of a text as 64-bit hashes, all words of many documents at once."""

import numpy as np
import xxhash

_SPACE = ord(" ")
_BYTES = 8  # of a word that are mixed into its hash at a time
_LONG = 64  # bytes; the few longer words are hashed one by one
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(_BYTES + 1)], np.uint64)
# Multipliers: the golden ratio's, and that of MurmurHash3's finalizer.
_GOLDEN, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD)


def hash_words(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Hash the words of a text in which all other characters are spaces.

    The hash depends on the word only. Words of equal length up to 8 bytes never share one.

    Returns:
        Hashes, [words] uint64, and where the words start, [words] int64, in the order of the text.
    """
    padded = b"".join([b" ", data, b" " * (_BYTES + 1)])
    inside = np.frombuffer(padded, np.uint8) != _SPACE
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, sizes = edges[::2], edges[1::2] - edges[::2]
    from_each_byte = np.ndarray((len(padded) - _BYTES + 1,), "<u8", padded, strides=(1,))
    hashes = sizes.astype(np.uint64) * _GOLDEN
    rest, done = np.arange(len(sizes)), 0
    while len(rest) and done < _LONG:
        left = sizes[rest] - done
        mixed = (hashes[rest] ^ (from_each_byte[starts[rest] + done] & _MASKS[np.minimum(left, _BYTES)])) * _MIX
        hashes[rest] = mixed ^ mixed >> np.uint64(32)
        rest, done = rest[left > _BYTES], done + _BYTES
    for word in rest.tolist():
        start = int(starts[word])
        hashes[word] = xxhash.xxh3_64_intdigest(padded[start : start + int(sizes[word])])
    hashes *= _GOLDEN
    return hashes ^ hashes >> np.uint64(29), starts - 1

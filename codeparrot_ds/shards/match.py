"""Whether the ids of a token file are those of a tokenizer, or of another one whose ids happen to be in its vocabulary.

A tokenizer gives the same ids for the text that its own ids stand for. Ids of another stand for text that it would
divide otherwise.
"""

import numpy as np

from codeparrot_ds.shards.foreign import TokenFile
from codeparrot_ds.tokenizer.encode import Encoder

_DOCUMENTS = 64
_IDS = 1000  # of each document, from its start
_ENOUGH = 2000  # ids to judge by
# Measured: 1.00 of the ids for the right tokenizer. For others, of 4,096 to 70,000 tokens, 0.46 to 0.89; 0.89 is one
# trained on a sixth of the same documents. Documents that were encoded sentence by sentence differ at the seams.
_SHARE = 0.97


def other_tokenizer(tokens: TokenFile, encoder: Encoder) -> str:
    """What is wrong if the ids are of another tokenizer; empty if not, or if there are too few to tell."""
    kept, ids = unchanged(tokens, encoder)
    if ids < _ENOUGH or kept >= _SHARE * ids:
        return ""
    return (
        f"{tokens.data}: only {kept / ids:.0%} of its ids are those that the tokenizer gives for the text that they "
        f"stand for ({ids:,} ids of up to {_DOCUMENTS} documents compared). The file was built with another tokenizer: "
        "name that one with --tokenizer."
    )


def unchanged(tokens: TokenFile, encoder: Encoder) -> tuple[int, int]:
    """Of a sample of the ids, how many stay the same at the same place of the text when it is encoded, and all."""
    ids, ends, sizes = tokens.ids(), np.cumsum(tokens.lengths, dtype=np.int64), encoder.token_bytes()
    kept = compared = 0
    for number in np.unique(np.linspace(0, len(ends) - 1, _DOCUMENTS).astype(np.int64)):
        length = int(tokens.lengths[number])
        start = int(ends[number]) - length
        document = ids[start : start + min(length, _IDS)].astype(np.int64)
        for piece in np.split(document, np.flatnonzero(sizes[document] == 0)):
            text = piece[sizes[piece] > 0]  # a special token is not text, and its name would be encoded as text
            if len(text):
                again = encoder.encode(encoder.decode(text)).astype(np.int64)
                kept += len(np.intersect1d(_placed(text, sizes), _placed(again, sizes)))
                compared += len(text)
    return kept, compared


def _placed(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """One number for each id and the bytes of text up to its end, [tokens] int64."""
    return np.cumsum(sizes[ids]) * len(sizes) + ids

"""Exact encoding of documents into token ids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codeparrot_ds.errors import DataError
from codeparrot_ds.files import digest_file, write_atomically
from codeparrot_ds.tokenizer.train import EOS_TOKEN, TOKENIZER_FILE


class Encoder:
    """A tokenizer directory, ready to encode. `tokenizers` is the referee of what is exact.

    Attributes:
        vocab_size: tokens, added ones included.
        eos_id: id that ends a document.
        digest: xxh3-128 of `tokenizer.json`.
    """

    def __init__(self, directory: Path) -> None:
        """Load `directory`/tokenizer.json. Raises DataError when it is missing, damaged, or has no end token."""
        from tokenizers import Tokenizer

        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise DataError(f"{path}: no such file. Make it with `codeparrot-ds tokenizer train`.")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception on a bad file
            raise DataError(f"{path}: not a tokenizer ({error}).") from None
        # A literal "<|endoftext|>" inside a document is text: split it, never read it as the end.
        self._tokenizer.encode_special_tokens = True
        eos_id = self._tokenizer.token_to_id(EOS_TOKEN)
        if eos_id is None:
            raise DataError(f"{path}: has no {EOS_TOKEN} token, so documents could not be told apart.")
        self.eos_id: int = eos_id
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.digest = digest_file(path)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, a [tokens] int32 array each, without an end token."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`, [tokens] of any integer type; bytes cut in mid-character show as U+FFFD."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's Hugging Face files into `target`; other files of its directory stay where they are.

    Raises DataError when `source` holds no tokenizer.
    """
    if not (source / TOKENIZER_FILE).is_file():
        raise DataError(f"{source / TOKENIZER_FILE}: no such file. Copy it again, or build the shards again.")
    target.mkdir(exist_ok=True)
    for name in (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            write_atomically(target / name, (source / name).read_bytes())

"""Train a GPT-2-style byte-level BPE tokenizer on a corpus and save it as a Hugging Face directory."""

import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_file,
    finished_manifest,
    make_directory,
    publish_directory,
    write_json,
)
from codeparrot_ds.system.jobs import say
from codeparrot_ds.system.paths import stored_address

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # the 256 bytes and the end-of-text token
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"  # of transformers
# `tokenizers` counts pairs in 32 bits and wraps at 2**31 without an error; that pair is then never merged. A text has
# fewer pairs than bytes, so no count can reach the limit in this much text.
MAX_TEXT_BYTES = 2**31 - 1
_CHECKED_BYTES = 4 << 20  # of text in which pairs are counted again: four seconds
_CHECKED_TOKENS = 8  # newest, whose occurrences bound the count of every pair that was not merged


def train(
    corpus_directory: Path,
    output: Path,
    vocab_size: int,
    max_seq_len: int = 1024,
    *,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> dict[str, Any]:
    """Train a tokenizer on a corpus and return its manifest.

    The initial alphabet is the 256 bytes, so any text can be encoded; `<|endoftext|>` has id 0. Of a corpus with more
    than `max_text_bytes` of text, it is trained on the documents with the smallest content digests.

    Args:
        corpus_directory: finished corpus.
        output: created if missing; a finished tokenizer of the same corpus and size is kept unchanged.
        vocab_size: number of tokens, including the bytes and `<|endoftext|>`.
        max_seq_len: recorded as `model_max_length` (tokens).
        max_text_bytes: text to train on, at most (bytes of UTF-8); up to the default, pair counts cannot overflow.

    Raises:
        DataError: the corpus is unfinished, or too small for `vocab_size` tokens; or a frequent pair was not merged.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"vocab size {vocab_size}: a byte-level vocabulary needs at least {MIN_VOCAB_SIZE} tokens.")
    corpus = Corpus.open(corpus_directory)
    inputs = {"corpus_digest": corpus.digest, "vocab_size": vocab_size, "max_seq_len": max_seq_len}
    if finished := finished_manifest(output, "tokenizer", inputs):
        return finished
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],  # first, so that it is id 0
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    make_directory(output.resolve().parent)
    sample = _Sample(corpus, max_text_bytes)
    if sample.documents < len(sample.sizes):
        say(
            f"note: training on {sample.documents:,} of {len(sample.sizes):,} documents ({sample.bytes / 1e9:.2f} of "
            f"{sum(sample.sizes) / 1e9:.2f} GB), chosen by content digest: `tokenizers` cannot count more."
        )
    tokenizer.train_from_iterator(sample.texts(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"{corpus_directory}: too small for {vocab_size:,} tokens; it yields {tokenizer.get_vocab_size():,}. "
            "Collect more source code, or choose a smaller vocabulary."
        )
    require_frequent_pairs_merged(tokenizer, sample.texts(), sample.texts(_CHECKED_BYTES))
    with publish_directory(output) as unfinished:
        tokenizer.save(str(unfinished / TOKENIZER_FILE))
        write_json(unfinished / CONFIG_FILE, _hugging_face_config(max_seq_len))
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": "tokenizer",
            **inputs,
            "eos_id": tokenizer.token_to_id(EOS_TOKEN),
            "corpus": stored_address(str(corpus_directory), output),
            "trained_on": {"documents": sample.documents, "bytes": sample.bytes},
            "digest": digest_file(unfinished / TOKENIZER_FILE),
        }
        write_json(unfinished / MANIFEST, manifest)
    return manifest


class _Sample:
    """The documents of a corpus with the smallest content digests, up to a number of bytes of text.

    Attributes:
        sizes: bytes of text of every document of the corpus, in its order.
        documents, bytes: of the sample.
    """

    def __init__(self, corpus: Corpus, most_bytes: int) -> None:
        self._corpus = corpus
        digests, self.sizes = array("Q"), array("q")
        for document in corpus:
            digests.append(int(document.digest()[:16], 16))
            self.sizes.append(len(document.text.encode()))
        self._order = np.argsort(np.array(digests, np.uint64), kind="stable")
        self._chosen = self._choose(most_bytes)
        self.documents = int(self._chosen.sum())
        self.bytes = int(np.array(self.sizes, np.int64)[self._chosen].sum())

    def texts(self, most_bytes: int = MAX_TEXT_BYTES) -> Iterable[str]:
        """The texts of the sample, in the corpus' order; of these, the first by digest up to `most_bytes`."""
        chosen = self._chosen & self._choose(most_bytes)
        return (document.text for document, wanted in zip(self._corpus, chosen, strict=True) if wanted)

    def _choose(self, most_bytes: int) -> np.ndarray:
        """Which documents to take, [documents] bool. One that is too large alone is left out."""
        sizes = np.array(self.sizes, np.int64)[self._order]
        fits = sizes <= most_bytes
        chosen = np.zeros(len(sizes), bool)
        chosen[self._order] = fits & (np.cumsum(np.where(fits, sizes, 0)) <= most_bytes)
        return chosen


def require_frequent_pairs_merged(tokenizer: "Tokenizer", texts: Iterable[str], some: Iterable[str]) -> None:
    """Check that no pair of tokens is frequent enough that it should have become a token.

    Pairs are counted in `some` of the texts, in 64 bits. Merging is greedy: no pair left over is more frequent than the
    last tokens made. Those occur in `texts` at most as often as their characters do.

    Args:
        tokenizer: byte-level BPE, just trained.
        texts: all texts that it was trained on.
        some: part of them.

    Raises:
        DataError: names the pair.
    """
    from tokenizers import Tokenizer

    newest = [tokenizer.decode([i]) for i in range(MIN_VOCAB_SIZE, tokenizer.get_vocab_size())]
    newest = [token for token in newest if "\ufffd" not in token][-_CHECKED_TOKENS:]  # whole characters
    if not newest:
        return
    occurrences = np.zeros(len(newest), np.int64)
    for text in texts:
        occurrences += [text.count(token) for token in newest]
    # `count` finds "  " once in three blanks, which hold two pairs. And where two merges make the same token, the pairs
    # with it become more frequent afterwards. Each is a factor of two at most.
    most = 4 * int(occurrences.min())
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    size = copy.get_vocab_size()
    pairs = [np.empty(0, np.int64)]
    for encoding in map(copy.encode, some):
        ids, words = np.array(encoding.ids, np.int64), np.array(encoding.word_ids, np.int64)
        pairs.append((ids[:-1] * size + ids[1:])[words[:-1] == words[1:]])
    found, counts = np.unique(np.concatenate(pairs), return_counts=True)
    if len(found) and int(counts.max()) > most:
        a, b = divmod(int(found[counts.argmax()]), size)
        raise DataError(
            f"the trained tokenizer is wrong: {copy.decode([a])!a} + {copy.decode([b])!a} occurs at least "
            f"{counts.max():,} times and was never merged, but {newest[int(occurrences.argmin())]!a} was, which occurs "
            f"at most {occurrences.min():,} times. Pair counts of `tokenizers` have overflowed: train on less text."
        )


def _hugging_face_config(max_seq_len: int) -> dict[str, Any]:
    """Content of `tokenizer_config.json` for AutoTokenizer. Clean-up of spaces is off because it would alter code."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "bos_token": EOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "unk_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
    }

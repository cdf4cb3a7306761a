"""Byte-level BPE from text, by `tokenizers` as the reference and by the much faster `ffbpe`, with equal results.

`ffbpe` counts words in parallel and merges from these counts. It is used only after both have split texts of all kinds
of characters into the same words, and made the same vocabulary and merges of a sample of the input, down to pairs that
occur once: there, nearly all are ties.
"""

import importlib.metadata
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codeparrot_ds.documents.excerpts import read_excerpts, some_pieces
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.system.jobs import run_apart, say
from codeparrot_ds.tokenizer.directory import EOS_TOKEN

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
RESERVED_TOKENS = (EOS_TOKEN, *FIM_TOKENS)  # ids 0 to 4
BYTES = 256
TRAINERS = ("auto", "ffbpe", "tokenizers")
# `tokenizers` counts pairs in 32 bits and wraps at 2**31 without an error; that pair is then never merged. A text has
# fewer pairs than bytes, so no count can reach the limit in this much text.
MAX_TEXT_BYTES = 2**31 - 1
_INSTALL = "pip install ffbpe"
# Similar words that lie side by side in memory make training a tenth faster, but a list takes 200 bytes per word.
_SORTED_WORDS = 2_000_000
_SAMPLE_TOKENS = 65_536  # more than a sample yields, so that merging ends when no pair is left
_CHECKED_TOKENS = 8  # newest, whose occurrences bound the count of every pair that was not merged


def reserved_tokens(more: int) -> list[str]:
    """Tokens that have ids before training, in order: `RESERVED_TOKENS`, and `more` without a meaning."""
    return [*RESERVED_TOKENS, *(f"<|reserved_special_token_{number}|>" for number in range(more))]


def trainer_label(name: str) -> str:
    """Name and version of a trainer, e.g. "ffbpe 0.1.10"; "ffbpe none" if it is not installed."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} none"


def choose_trainer(wanted: str, pieces: Sequence[Piece], text_field: str) -> str:
    """Choose the trainer, "ffbpe" or "tokenizers"; prints a note on stderr if "auto" selects the slow one.

    Args:
        wanted: "auto", "ffbpe" or "tokenizers".
        pieces: of the input, from which the sample is taken.
        text_field: field of a row that holds the content.

    Raises:
        ConfigError: "ffbpe" was requested but cannot be used.
    """
    if wanted == "tokenizers":
        return wanted
    reason = run_apart(why_not_fast, (some_pieces(pieces), text_field))  # apart: it starts threads
    if reason is None:
        return "ffbpe"
    if wanted == "ffbpe":
        raise ConfigError(f"ffbpe cannot be used: {reason}. Use --trainer auto.")
    say(f"note: training with tokenizers, because {reason}. It takes about five times the CPU time.")
    return "tokenizers"


def why_not_fast(sample: tuple[Sequence[Piece], str]) -> str | None:
    """Why ffbpe cannot be used, or None if it makes the same tokenizer of a sample as tokenizers.

    Args:
        sample: pieces of the input, and the field of a row that holds the content.
    """
    try:
        import ffbpe  # noqa: F401
    except ImportError:
        return f"ffbpe is not installed ({_INSTALL})"
    use_one_thread()
    texts, hard, reserved = list(read_excerpts(*sample)), list(_hard_texts()), reserved_tokens(0)
    reference = train_on_texts(texts, _SAMPLE_TOKENS, reserved)
    try:
        counter = new_counter()
        counter.add_batch(hard)
        if counter.words() != count_words(hard):
            return f"{trainer_label('ffbpe')} splits texts into other words"
        counter.clear()
        counter.add_batch(texts)
        fast = train_on_counts(counter, _SAMPLE_TOKENS, reserved)
    except BaseException as error:  # a Rust panic is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        return f"{trainer_label('ffbpe')} failed on a sample of the input ({type(error).__name__}: {error})"
    found, right = (json.loads(each.to_str())["model"] for each in (fast, reference))
    if found["merges"] != right["merges"]:
        pairs = zip(found["merges"], right["merges"], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found["merges"]), len(right["merges"])))
        return f"{trainer_label('ffbpe')} merges other pairs in a sample of the input, from merge {at:,} on"
    if fast.to_str() != reference.to_str():
        return f"{trainer_label('ffbpe')} gives tokens other ids in a sample of the input"
    return None if _counts_in_64_bits() else f"counts of {trainer_label('ffbpe')} overflow"


def _hard_texts() -> Iterator[str]:
    """Texts that pre-tokenizers may split differently: white space, contractions, letters and marks, long words."""
    for white in (" ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u3000"):
        yield from (f"a{white * n}b{white * n}" for n in (1, 2, 70))
    for end in ("s", "S", "ll", "re", "\u017f", "x"):
        yield from (f"{before}'{end} " for before in ("it", "\u00e9", "1", " "))
    for code in (*range(0x500), *range(0x500, 0x110000, 977)):
        if not 0xD800 <= code < 0xE000:
            yield "  {0}'s'{0} a{0}1{0}".format(chr(code))
    yield "x" * 5000 + "0" * 5000 + "=" * 5000
    yield " ".join(RESERVED_TOKENS)


def _counts_in_64_bits() -> bool:
    """Whether counts beyond 2**32 are right, in a counter and of pairs: with 32 bits, the second word would win."""
    counter = new_counter()
    counter.add_batch(["xy"])
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(33):  # twice as many each time
            counter.save(f"{directory}/words")
            counter.merge(load_counter(Path(directory) / "words"))
    counter.add_batch(["ab"] * 7)
    if counter.words() != {"xy": 1 << 33, "ab": 7}:
        return False
    merged = train_on_counts(counter, BYTES + 2, [EOS_TOKEN])
    return bool(json.loads(merged.to_str())["model"]["merges"] == [["x", "y"]])


def use_one_thread() -> None:
    """Let ffbpe use one thread, if it has not started any. More are no faster, and workers use the other cores."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")


def new_counter() -> Any:
    """An empty `ffbpe.WordCounter` of GPT-2's words. Its counts have 64 bits, and counters can be merged."""
    import ffbpe

    return ffbpe.PreTokenizer([]).word_counter()  # no special tokens: in a document, they are text


def load_counter(path: Path) -> Any:
    """A counter that was saved in `path`."""
    import ffbpe

    return ffbpe.PreTokenizer([]).load_word_counter(str(path))


def train_on_saved_counts(task: tuple[Sequence[Path], int, Sequence[str]]) -> str:
    """Content of the tokenizer.json that `train_on_counts` makes of all counters saved in these files.

    Args:
        task: the files, the size of the vocabulary, and the reserved tokens.
    """
    files, vocab_size, reserved = task
    use_one_thread()
    counter = new_counter()
    for path in files:
        counter.merge(load_counter(path))
    return str(train_on_counts(counter, vocab_size, reserved).to_str(pretty=True))


def train_on_counts(counter: Any, vocab_size: int, reserved: Sequence[str]) -> "Tokenizer":
    """Train with ffbpe on the words of `counter`, which is empty afterwards.

    The tokenizer has fewer than `vocab_size` tokens if the words yield no more.
    """
    import ffbpe
    from tokenizers import Tokenizer, models

    trainer = ffbpe.BpeTrainer(list(reserved), unit="byte", initial_alphabet="byte_level", tie_break="smallest_pair_id")
    if counter.len <= _SORTED_WORDS:
        trainer.add_words(sorted(counter.words().items()))
        counter.clear()
    else:
        trainer.add_word_counter(counter)
    trainer.train(vocab_size)
    model = trainer.validate_model()
    with tempfile.TemporaryDirectory() as directory:
        vocabulary, merges = Path(directory) / "vocab.json", Path(directory) / "merges.txt"
        model.save_files(vocabulary, merges, format="gpt2")
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [(left, right) for left, right, *_ in (line.split(" ") for line in lines if line)]  # and "=> count"
        tokenizer = Tokenizer(models.BPE(json.loads(vocabulary.read_text(encoding="utf-8")), pairs))
    _complete(tokenizer)
    tokenizer.add_special_tokens(list(reserved))
    return tokenizer


def count_words(texts: Iterable[str]) -> Counter[str]:
    """The words into which `tokenizers` splits texts, and how often each occurs."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[str] = Counter()
    for text in texts:
        encoded, start = text.encode(), 0
        for word, _ in split.pre_tokenize_str(text):  # a character for each byte
            words[encoded[start : start + len(word)].decode()] += 1
            start += len(word)
    return words


def train_on_texts(
    texts: Iterable[str], vocab_size: int, reserved: Sequence[str], show_progress: bool = False
) -> "Tokenizer":
    """Train with tokenizers, whose result defines what is right."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    _complete(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(reserved),  # first, so that they have the first ids
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _complete(tokenizer: "Tokenizer") -> None:
    """Set all but the model."""
    from tokenizers import decoders, pre_tokenizers, processors

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


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

    first = BYTES + len(tokenizer.get_added_tokens_decoder())
    newest = [tokenizer.decode([i]) for i in range(first, tokenizer.get_vocab_size())]
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

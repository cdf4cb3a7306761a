"""Train a GPT-2-style byte-level BPE tokenizer on a corpus and save it as a Hugging Face directory."""

import sys
from pathlib import Path
from typing import Any

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

EOS_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # the 256 bytes and the end-of-text token
TOKENIZER_FILE = "tokenizer.json"


def train(corpus_directory: Path, output: Path, vocab_size: int, max_seq_len: int = 1024) -> dict[str, Any]:
    """Train a tokenizer on every document of a corpus and return its manifest.

    The initial alphabet is the 256 bytes, so any text can be encoded; `<|endoftext|>` has id 0.

    Args:
        corpus_directory: finished corpus.
        output: created if missing; a finished tokenizer of the same corpus and size is kept unchanged.
        vocab_size: number of tokens, including the bytes and `<|endoftext|>`.
        max_seq_len: recorded as `model_max_length` (tokens).

    Raises:
        DataError: the corpus is unfinished, or too small for `vocab_size` tokens.
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
    make_directory(output.parent)
    tokenizer.train_from_iterator((document.text for document in corpus), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"{corpus_directory}: too small for {vocab_size:,} tokens; it yields {tokenizer.get_vocab_size():,}. "
            "Collect more source code, or choose a smaller vocabulary."
        )
    with publish_directory(output) as unfinished:
        tokenizer.save(str(unfinished / TOKENIZER_FILE))
        write_json(unfinished / "tokenizer_config.json", _hugging_face_config(max_seq_len))
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": "tokenizer",
            **inputs,
            "eos_id": tokenizer.token_to_id(EOS_TOKEN),
            "corpus": str(corpus_directory),
            "digest": digest_file(unfinished / TOKENIZER_FILE),
        }
        write_json(unfinished / MANIFEST, manifest)
    return manifest


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

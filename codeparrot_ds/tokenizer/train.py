"""Train a GPT-2-style byte-level BPE tokenizer on documents and save it as a Hugging Face directory.

Workers count words, one process merges. The tokenizer is a function of the documents and options alone: not of the
number of workers, the engine, interruptions, or the order of the documents.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from codeparrot_ds.documents.inputs import Inputs, deal, search_inputs, text_bytes
from codeparrot_ds.documents.versions import sources_of, versions_of
from codeparrot_ds.documents.walk import QUARANTINE, REJECTED, count_reasons, encode_skipped
from codeparrot_ds.errors import ClusterError, ConfigError, DataError
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_file,
    digest_json,
    exclusive_lock,
    finished_manifest,
    make_directory,
    open_work,
    publish_directory,
    require_empty,
    write_json,
)
from codeparrot_ds.system.inputs_record import INPUTS_RECORD, encode_record, require_same_inputs
from codeparrot_ds.system.jobs import ENGINES, progress, run_apart, run_tasks, say
from codeparrot_ds.system.paths import stored_address
from codeparrot_ds.system.processes import available_cores
from codeparrot_ds.system.storage import LocalDirectory
from codeparrot_ds.tokenizer import trainers
from codeparrot_ds.tokenizer.count import Bounds, Receipt, Task, sampled_texts, smallest, write_digests, write_words
from codeparrot_ds.tokenizer.directory import CONFIG_FILE, EOS_TOKEN, TOKENIZER_FILE
from codeparrot_ds.tokenizer.trainers import (
    BYTES,
    TRAINERS,
    choose_trainer,
    require_frequent_pairs_merged,
    reserved_tokens,
    train_on_saved_counts,
    train_on_texts,
    trainer_label,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TASKS = 64  # target number
_MIN_TASK_BYTES, _MAX_TASK_BYTES = 16_000_000, 256_000_000  # of text
_CHECKED_BYTES = 4 << 20  # of text in which pairs are counted again: four seconds


@dataclass(frozen=True)
class TrainOptions:
    """How a tokenizer is trained. The first five decide what it is, the others how it is made.

    Attributes:
        documents: train on this many documents, those with the smallest content digests; None for all.
        reserve: number of reserved tokens without a meaning, next to those of `trainers.RESERVED_TOKENS`.
        text_field: field of a row that holds the content.
        suffix: read files with this suffix in the input directories, one document per file.
        on_bad_document: "fail", or "skip" to skip bad documents and list them in `quarantine.jsonl`.
        trainer: "auto", "ffbpe" or "tokenizers".
        workers: local processes; None for one per core.
        engine: "local", or "ray" for a Ray cluster.

    Raises ConfigError for a bad value.
    """

    documents: int | None = None
    reserve: int = 0
    text_field: str = "content"
    suffix: str | None = None
    on_bad_document: str = "fail"
    trainer: str = "auto"
    workers: int | None = None
    engine: str = "local"

    def __post_init__(self) -> None:
        if self.documents is not None and self.documents < 1:
            raise ConfigError(f"--documents {self.documents}: must be at least 1.")
        if self.reserve < 0:
            raise ConfigError(f"--reserve {self.reserve}: must not be negative.")
        if self.on_bad_document not in ("fail", "skip"):
            raise ConfigError(f"--on-bad-document {self.on_bad_document}: must be fail or skip.")
        if self.trainer not in TRAINERS:
            raise ConfigError(f"--trainer {self.trainer}: must be one of {', '.join(TRAINERS)}.")
        if self.engine not in ENGINES:
            raise ConfigError(f"--engine {self.engine}: must be one of {', '.join(ENGINES)}.")


def train(
    inputs: Sequence[str | Path] | str | Path,
    output: Path,
    vocab_size: int,
    max_seq_len: int = 1024,
    options: TrainOptions | None = None,
) -> dict[str, Any]:
    """Train a tokenizer and return its manifest.

    The initial alphabet is the 256 bytes, so any text can be encoded. Ids 0 to 4 are `trainers.RESERVED_TOKENS`.

    Args:
        inputs: what `documents.inputs.find_inputs` takes: corpus directories, data files, globs, URLs, Hub datasets.
        output: created if missing; a finished tokenizer of the same input and options is kept unchanged.
        vocab_size: number of tokens, including the bytes and the reserved tokens.
        max_seq_len: recorded as `model_max_length` (tokens).
        options: None for the defaults.

    Raises:
        ConfigError: an option is invalid, or `output` is not empty.
        DataError: damaged input, or too little for `vocab_size` tokens; or a frequent pair was not merged.
        ClusterError: workers were lost permanently.
    """
    options = options or TrainOptions()
    least = BYTES + len(reserved_tokens(options.reserve))
    if vocab_size < least:
        raise ConfigError(f"vocabulary of {vocab_size:,} tokens: bytes and reserved tokens alone are {least:,}.")
    arguments = [str(inputs)] if isinstance(inputs, str | Path) else [str(argument) for argument in inputs]
    output = output.resolve()
    found = search_inputs(arguments, options.suffix)
    stated = {
        "documents": options.documents,
        "reserve": options.reserve,
        "text_field": options.text_field,
        "suffix": options.suffix,
        "on_bad_document": options.on_bad_document,
    }
    wanted = {"vocab_size": vocab_size, "max_seq_len": max_seq_len, "options": stated}
    files = versions_of(found.pieces)
    work = output.with_name(f".{output.name}.work")

    def finished() -> dict[str, Any] | None:
        manifest = finished_manifest(output, "tokenizer", wanted)
        if manifest is not None:
            require_same_inputs(LocalDirectory(output), "tokenizer", files)
            shutil.rmtree(work, ignore_errors=True)  # a process may have been killed after writing the manifest
        return manifest

    if manifest := finished():
        return manifest
    make_directory(output.parent)
    require_empty(output)
    make_directory(work)
    with exclusive_lock(work / ".lock", f"{output}: another process trains a tokenizer here. Wait for it, or stop it."):
        if manifest := finished():  # by the process that held the lock
            return manifest
        manifest = _Training(arguments, found, output, work, options, wanted).run()
        shutil.rmtree(work)
        return manifest


class _Training:
    """One call of `train`."""

    def __init__(
        self,
        arguments: Sequence[str],
        inputs: Inputs,
        output: Path,
        work: Path,
        options: TrainOptions,
        wanted: dict[str, Any],
    ) -> None:
        self._arguments, self._inputs, self._output, self._options = arguments, inputs, output, options
        self._wanted, self._work = wanted, work
        self._reserved = reserved_tokens(options.reserve)
        self._chosen = choose_trainer(options.trainer, inputs.pieces, options.text_field)
        self._label = trainer_label(self._chosen)
        self._tasks = self._plan()

    def run(self) -> dict[str, Any]:
        """Run what is not finished, and publish the tokenizer."""
        if self._options.documents is not None or self._chosen == "tokenizers":
            self._choose_sample()
        tokenizer, receipts = self._by_counts() if self._chosen == "ffbpe" else self._by_texts()
        if tokenizer.get_vocab_size() != self._wanted["vocab_size"]:
            shutil.rmtree(self._work)
            raise DataError(
                f"{', '.join(self._arguments)}: too small for {self._wanted['vocab_size']:,} tokens; "
                f"{sum(each.taken for each in receipts):,} documents yield {tokenizer.get_vocab_size():,}. Add source "
                "code, or choose a smaller vocabulary."
            )
        return self._publish(tokenizer, receipts)

    def _plan(self) -> list[Task]:
        """The tasks: a function of the input files alone."""
        options, pieces = self._options, self._inputs.pieces
        stated = {key: value for key, value in self._wanted["options"].items() if key != "reserve"}

        def name_of(on_bad_document: str) -> str:
            asked = {**stated, "on_bad_document": on_bad_document}
            return digest_json([versions_of(pieces), asked, self._label])[:16]

        # A task that was finished with "fail" has no bad document, so "skip" would give the same.
        directory = open_work(self._work, name_of(options.on_bad_document), name_of("fail"))
        task_bytes = min(max(sum(map(text_bytes, pieces)) / _TASKS, _MIN_TASK_BYTES), _MAX_TASK_BYTES)
        return [
            Task(
                dealt,
                options.text_field,
                options.on_bad_document == "skip",
                directory / f"{number:05d}",
                options.documents,
                trainer=self._label,
            )
            for number, dealt in enumerate(deal(pieces, task_bytes))
        ]

    def _run(self, function: Callable[[Task], None], what: str, outputs: Sequence[Path]) -> None:
        """Run the tasks whose output does not exist."""
        unfinished = [task for task, path in zip(self._tasks, outputs, strict=True) if not path.exists()]
        done = len(outputs) - len(unfinished)
        workers = self._options.workers or available_cores()
        results = run_tasks(function, unfinished, workers, engine=self._options.engine)
        for _ in progress(results, what, len(outputs), "task", done=done):
            pass
        if missing := sum(not path.exists() for path in outputs):
            raise ClusterError(
                f"{self._work}: {missing:,} of {len(outputs):,} tasks ran, but their output is missing. Use a disk "
                "that all workers share."
            )

    def _choose_sample(self) -> None:
        """Give every task the bounds of the sample."""
        most = self._options.documents
        self._run(write_digests, "choosing documents", [task.digests for task in self._tasks])
        digests = [np.load(task.digests, mmap_mode="r") for task in self._tasks]
        chosen, documents = np.empty((2, 0), np.uint64), 0
        for each in digests:
            documents += each.shape[1]
            chosen = smallest([chosen, each], most)
        documents = min(documents, most or documents)
        if self._chosen == "tokenizers":
            sizes = chosen[1].astype(np.int64)
            chosen = chosen[:, np.cumsum(sizes) <= trainers.MAX_TEXT_BYTES]
            if chosen.shape[1] < documents:
                say(
                    f"note: training on {chosen.shape[1]:,} of {documents:,} documents ({chosen[1].sum() / 1e9:.2f} of "
                    f"{sizes.sum() / 1e9:.2f} GB), chosen by content digest: `tokenizers` cannot count more."
                )
        last = int(chosen[0, -1]) if chosen.size else 0
        left = int((chosen[0] == last).sum())  # copies of this content in the sample
        for number, each in enumerate(digests):
            copies = min(left, int((each[0] == last).sum()))
            left -= copies
            self._tasks[number] = msgspec.structs.replace(self._tasks[number], bounds=Bounds(last, copies))

    def _by_counts(self) -> tuple["Tokenizer", list[Receipt]]:
        from tokenizers import Tokenizer

        self._run(write_words, "counting words", [task.receipt for task in self._tasks])
        words = [task.words for task in self._tasks]
        task = (words, self._wanted["vocab_size"], self._reserved)
        tokenizer = Tokenizer.from_str(run_apart(train_on_saved_counts, task))  # apart: it starts threads
        return tokenizer, [msgspec.json.decode(task.receipt.read_bytes(), type=Receipt) for task in self._tasks]

    def _by_texts(self) -> tuple["Tokenizer", list[Receipt]]:
        receipts = [Receipt() for _ in self._tasks]
        vocab_size = self._wanted["vocab_size"]
        tokenizer = train_on_texts(self._texts(receipts), vocab_size, self._reserved, sys.stderr.isatty())
        if tokenizer.get_vocab_size() == vocab_size:
            require_frequent_pairs_merged(tokenizer, self._texts(), _first(self._texts(), _CHECKED_BYTES))
        return tokenizer, receipts

    def _texts(self, receipts: Sequence[Receipt] | None = None) -> Iterator[str]:
        """The sample; `receipts`, one per task, count its documents."""
        for number, task in enumerate(self._tasks):
            yield from sampled_texts(task, receipts[number] if receipts is not None else Receipt())

    def _publish(self, tokenizer: "Tokenizer", receipts: Sequence[Receipt]) -> dict[str, Any]:
        quarantined = [bad for receipt in receipts for bad in receipt.quarantined]
        counts = {
            "read": sum(receipt.read for receipt in receipts),
            "trained on": sum(receipt.taken for receipt in receipts),
            "empty": sum(receipt.empty for receipt in receipts),
            "quarantined": sum(bad.documents for bad in quarantined),
        }
        counts["not in the sample"] = counts["read"] - sum(counts[name] for name in list(counts)[1:])
        beside = {
            REJECTED: encode_skipped(self._inputs.skipped),
            QUARANTINE: b"".join(msgspec.json.encode(bad) + b"\n" for bad in quarantined),
            INPUTS_RECORD: encode_record(versions_of(self._inputs.pieces)),
        }
        with publish_directory(self._output) as unfinished:
            tokenizer.save(str(unfinished / TOKENIZER_FILE))
            write_json(unfinished / CONFIG_FILE, _hugging_face_config(self._wanted["max_seq_len"]))
            for name, data in beside.items():
                if data:
                    (unfinished / name).write_bytes(data)
            manifest = {
                "format_version": FORMAT_VERSION,
                "kind": "tokenizer",
                **self._wanted,
                "eos_id": tokenizer.token_to_id(EOS_TOKEN),
                "inputs": [stored_address(each, self._output) for each in self._arguments],
                "sources": sources_of(self._inputs.pieces),
                "skipped_files": count_reasons(self._inputs.skipped),
                "documents": counts,
                "trained_on": {"documents": counts["trained on"], "bytes": sum(each.bytes for each in receipts)},
                "trainer": self._label,
                "digest": digest_file(unfinished / TOKENIZER_FILE),
            }
            write_json(unfinished / MANIFEST, manifest)
        return manifest


def _first(texts: Iterator[str], most_bytes: int) -> Iterator[str]:
    """Texts of up to `most_bytes` in all (UTF-8), and the first in any case."""
    size = 0
    for text in texts:
        size += len(text.encode())
        if size > most_bytes and size > len(text.encode()):
            return
        yield text


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

"""Clean a corpus: remove duplicates, near-duplicates and what the rules of options.py name, and account for the rest.

Five steps. The tasks of each leave files in OUTPUT/.work, so that a killed run is continued by the same command, on any
number of workers:

    measure     per task of input: digests, the rules on single documents, signatures
    exact       once: keep one of all documents that are equal but for white space
    edges       per band: pairs of documents with equal keys; then once: components
    extremes    per group of components: the documents to remove
    write       per output file: the documents to keep

The result depends on the input and the options only.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from codeparrot_ds.corpus.card import CARD, cleaned_card
from codeparrot_ds.corpus.decisions import (
    BandTask,
    Decisions,
    GroupTask,
    compared_documents,
    decide,
    find_components,
    group_components,
    keep_one_of_equals,
    remove_similar,
    save,
    write_edges,
)
from codeparrot_ds.corpus.decontamination import Problems
from codeparrot_ds.corpus.extra import versions
from codeparrot_ds.corpus.files import (
    FORMATS,
    FileTask,
    count_removed,
    plan_files,
    write_file,
    write_rejected,
)
from codeparrot_ds.corpus.groups import describe_groups, describe_sizes
from codeparrot_ds.corpus.measure import Task, measure_task
from codeparrot_ds.corpus.measured import MEASURED_FORMAT, AllMeasured
from codeparrot_ds.corpus.options import Cleaning, Decontamination
from codeparrot_ds.corpus.output import WORK, finished_corpus, remove_work, require_ours, require_outside
from codeparrot_ds.corpus.tallies import add_up
from codeparrot_ds.documents.inputs import Inputs, deal, search_inputs, text_bytes
from codeparrot_ds.documents.versions import sources_of, versions_of
from codeparrot_ds.documents.walk import REJECTED, REMOVED, count_reasons, encode_skipped
from codeparrot_ds.errors import ClusterError, ConfigError, DataError
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_json,
    exclusive_lock,
    make_directory,
    open_work,
    read_json,
    read_manifest,
    require_free_space,
    write_atomically,
    write_json,
)
from codeparrot_ds.system.inputs_record import INPUTS_RECORD, encode_record
from codeparrot_ds.system.jobs import ENGINES, Slice, progress, run_tasks, say
from codeparrot_ds.system.paths import stored_address
from codeparrot_ds.system.processes import available_cores
from codeparrot_ds.tokenizer.directory import tokenizer_digest
from codeparrot_ds.tokenizer.encode import Encoder
from codeparrot_ds.tokenizer.proof import choose_encoder

AnyTask = TypeVar("AnyTask")
_TASK_BYTES = 32_000_000  # of text per task of the first step, unless there are more tasks than
_MAX_TASKS = 4096  # every later task opens the results of all of them
_DISK_SHARE = 0.5  # of the text: measured on Python, the result takes 0.24 and the work in progress 0.13
_FILE_BYTES = 64_000_000  # of text per file of the result


@dataclass(frozen=True)
class CleanOptions:
    """How a corpus is cleaned. All but the last four decide what is in it.

    Attributes:
        cleaning: the rules.
        suffix: read files with this suffix in the input directories, one document per file.
        tokenizer: directory of a tokenizer, for the rule on characters per token; None leaves it out.
        on_bad_document: "fail", or "skip" to skip unreadable documents and list them.
        file_format: "jsonl.zst" or "parquet".
        file_bytes: text per file.
        workers: local processes; None for one per core.
        engine: "local", or "ray" for a Ray cluster.
        part: the slice of the first step's tasks to run; the last slice to finish runs the other steps.
        dry_run: count what would be removed, and write nothing. The work is done in a temporary directory.

    Raises ConfigError for a bad value.
    """

    cleaning: Cleaning = field(default_factory=Cleaning)
    suffix: str | None = None
    tokenizer: Path | None = None
    on_bad_document: str = "fail"
    file_format: str = "jsonl.zst"
    file_bytes: int = _FILE_BYTES
    workers: int | None = None
    engine: str = "local"
    part: Slice | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.cleaning.fields.resolve()
        if self.on_bad_document not in ("fail", "skip"):
            raise ConfigError(f"--on-bad-document {self.on_bad_document}: must be fail or skip.")
        if self.file_format not in FORMATS:
            raise ConfigError(f"--format {self.file_format}: must be {' or '.join(FORMATS)}.")
        if self.engine not in ENGINES:
            raise ConfigError(f"--engine {self.engine}: must be one of {', '.join(ENGINES)}.")
        if self.engine == "ray" and self.part is not None:
            raise ConfigError("a Ray cluster distributes all tasks by itself: omit --slice, or omit --engine ray.")
        if self.dry_run and self.part is not None:
            raise ConfigError("--dry-run counts the whole input: omit --slice, or omit --dry-run.")


def clean(inputs: Sequence[str | Path], output: Path, options: CleanOptions | None = None) -> dict[str, Any] | None:
    """Clean documents into the corpus directory `output`, and return its manifest.

    Args:
        inputs: what `documents.inputs.find_inputs` takes.
        output: created if missing; a finished corpus of the same input and options is kept.
        options: None for the defaults.

    Returns:
        The manifest, or None while other slices have not finished.

    Raises:
        ConfigError: invalid option, `output` holds something else or is part of the input, no permission, or disk too
            small.
        DataError: damaged input, or `output` contains another corpus.
        ClusterError: workers were lost permanently.
    """
    options = options or CleanOptions()
    output = output.resolve()
    arguments = [str(argument) for argument in inputs]
    require_outside(arguments, output)
    found = search_inputs(arguments, options.suffix)
    cleaning = options.cleaning.model_dump(mode="json")
    problems = cleaning["decontamination"]["problems"]
    cleaning["decontamination"]["problems"] = [stored_address(each, output) for each in problems]
    stated = {
        "cleaning": cleaning,
        "suffix": options.suffix,
        "tokenizer": None if options.tokenizer is None else tokenizer_digest(options.tokenizer),
        "on_bad_document": options.on_bad_document,
        "file_format": options.file_format,
        "file_bytes": options.file_bytes,
        "problems": _problems_digest(options.cleaning.decontamination),
    }
    wanted = {"options": stated, "sources": sources_of(found.pieces)}
    files = versions_of(found.pieces)
    if finished := finished_corpus(output, wanted, files):
        if not options.dry_run:
            remove_work(output)  # a process may have been killed after writing the manifest
        return finished
    if options.cleaning.heuristics is not None and options.tokenizer is None:
        say("note: characters per token are not checked, which needs --tokenizer.")
    needed_bytes = int(_DISK_SHARE * sum(map(text_bytes, found.pieces)))
    if options.dry_run:
        with TemporaryDirectory(prefix="corpus-clean-") as directory:
            require_free_space(Path(directory), needed_bytes, "counting")
            return _Cleaner(output, Path(directory), found, options, wanted).run()
    require_ours(output)
    make_directory(output)
    require_free_space(output, needed_bytes, "the cleaned corpus")
    busy = f"{output}: another process is cleaning a corpus here. Wait for it, or stop it."
    name = ".lock" if options.part is None else f".lock-{options.part.index}-of-{options.part.count}"
    with exclusive_lock(output / name, busy):
        finished = finished_corpus(output, wanted, files)  # by the process that held the lock, or by another slice
        if finished is None:

            def name_of(on_bad_document: str) -> str:
                options = {**stated, "on_bad_document": on_bad_document}
                return digest_json([{**wanted, "options": options}, files, versions(), MEASURED_FORMAT])[:16]

            # A task that was finished with "fail" has no bad document, so "skip" would give the same.
            work = open_work(output / WORK, name_of(options.on_bad_document), name_of("fail"))
            finished = _Cleaner(output, work, found, options, wanted).run()
        if finished is not None:
            remove_work(output)
        return finished


def _problems_digest(rules: Decontamination) -> str | None:
    """Digest of the problems to look for, so that a corpus cleaned of others is not taken for the wanted one."""
    if not rules.enabled:
        return None
    problems = Problems.load(rules)
    if problems.too_short:
        say(f"note: too short to be found in documents: {', '.join(problems.too_short)}.")
    return problems.digest


class _Cleaner:
    """One call of `clean`."""

    def __init__(self, output: Path, work: Path, inputs: Inputs, options: CleanOptions, wanted: dict[str, Any]) -> None:
        self._output, self._work, self._inputs, self._options, self._wanted = output, work, inputs, options, wanted
        self._fields = options.cleaning.fields.resolve()
        text = sum(map(text_bytes, inputs.pieces))
        self._pieces = deal(inputs.pieces, max(_TASK_BYTES, text // _MAX_TASKS))
        self._directories = [work / f"measured-{number:05d}" for number in range(len(self._pieces))]

    def run(self) -> dict[str, Any] | None:
        """Run all steps that are not finished. Returns None while other slices are at work."""
        self._measure()
        if missing := sum(not directory.exists() for directory in self._directories):
            if not self._is_finished():
                say(
                    f"{self._output}: {missing:,} of {len(self._directories):,} tasks remain for other slices; the "
                    "last one finishes the corpus."
                )
                return None
            return read_manifest(self._output, "corpus")
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive_lock(self._work / ".lock", "busy"))
            except (ConfigError, FileNotFoundError):  # FileNotFoundError: the other slice is done
                say(f"{self._output}: another slice finishes the corpus.")
                return None
            if self._is_finished():  # by the slice that held the lock
                return read_manifest(self._output, "corpus")
            measured = AllMeasured(self._directories)
            self._require_documents(measured)
            representative = keep_one_of_equals(measured)
            decisions = decide(measured, representative, self._compare(measured, representative))
            manifest = self._account(measured, decisions)
            return manifest if self._options.dry_run else self._write(measured, decisions, manifest)

    def _is_finished(self) -> bool:
        """Whether another slice has finished the corpus."""
        return not self._options.dry_run and (self._output / MANIFEST).exists()

    def _require_documents(self, measured: AllMeasured) -> None:
        """Raise DataError if there is no document to decide on."""
        if len(measured):
            return
        pieces, bad = self._inputs.pieces, [each for part in measured.parts for each in part.info["bad"]]
        names = pieces[0].location + (f" and {len(pieces) - 1:,} other files" if len(pieces) > 1 else "")
        why = f"; {len(bad):,} unreadable, the first of them {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise DataError(f"{names}: no documents{why}. Name other input.")

    def _measure(self) -> None:
        options = self._options
        encoder = "tokenizers"
        if options.tokenizer is not None:
            encoder = choose_encoder(options.tokenizer, Encoder(options.tokenizer), "auto", [])
        tasks = [
            Task(
                number,
                pieces,
                self._fields,
                options.on_bad_document == "skip",
                options.cleaning.model_dump_json(),
                None if options.tokenizer is None else options.tokenizer.resolve(),
                encoder,
                self._directories[number],
            )
            for number, pieces in enumerate(self._pieces)
        ]
        mine = options.part.of(tasks) if options.part is not None else tasks
        self._run(measure_task, mine, [task.output for task in mine], "measuring")

    def _compare(self, measured: AllMeasured, representative: np.ndarray) -> list[Path]:
        """Find near-duplicates. Returns the files that list them."""
        rules = self._options.cleaning.near_duplicates
        if rules is None:
            return []
        work, compared = self._work, self._work / "compared.npy"
        documents = compared_documents(measured, representative)
        save(compared, documents)
        edges = [work / f"edges-{band:03d}.npy" for band in range(rules.bands)]
        bands = [BandTask(band, self._directories, compared, path) for band, path in enumerate(edges)]
        self._run(write_edges, bands, edges, "finding candidates")
        members, starts = find_components(len(documents), edges)
        save(work / "members.npy", members)
        save(work / "starts.npy", starts)
        groups = [
            GroupTask(
                number,
                first,
                last,
                rules.jaccard,
                self._directories,
                compared,
                work / "members.npy",
                work / "starts.npy",
                work / f"removed-{number:05d}.npy",
            )
            for number, (first, last) in enumerate(group_components(starts))
        ]
        removed = [group.output for group in groups]
        self._run(remove_similar, groups, removed, "comparing")
        for part in measured.parts:
            part.delete_signatures()  # so that they do not take up the disk beside the result
        return removed

    def _account(self, measured: AllMeasured, decisions: Decisions) -> dict[str, Any]:
        """The manifest without the files."""
        counts, kept = count_removed(measured, decisions), int(decisions.kept.sum())
        sizes = measured.column("text_bytes")
        read = len(measured) + counts["unreadable"]
        assert read == kept + sum(counts.values()), (read, kept, counts)
        came_in = {
            what: add_up(part.info[what] for part in measured.parts)
            for what in ("licences", "languages", "suffixes", "secrets")
        }
        return {
            "format_version": FORMAT_VERSION,
            "kind": "corpus",
            **self._wanted,
            "versions": versions(),
            "skipped_files": count_reasons(self._inputs.skipped),
            "read": read,
            "documents": kept,
            "text_bytes": int(measured.column("text_bytes")[decisions.kept].sum()),
            "removed": dict(sorted(counts.items())),
            "read_by": came_in,
            "sizes": {"read": describe_sizes(sizes), "kept": describe_sizes(sizes[decisions.kept])},
            "duplicate_groups": describe_groups(measured, decisions),
        }

    def _write(self, measured: AllMeasured, decisions: Decisions, manifest: dict[str, Any]) -> dict[str, Any]:
        options, output, kept = self._options, self._output, decisions.kept
        if not kept.any():
            raise DataError(f"{output}: every document was removed. Relax the rules, or look at the input (--dry-run).")
        save(self._work / "kept.npy", kept)
        secrets = options.cleaning.secrets
        redact = secrets.model_dump_json() if secrets is not None and secrets.mode == "redact" else ""
        tasks = [
            FileTask(
                number,
                start,
                stop,
                self._pieces,
                self._directories,
                self._work / "kept.npy",
                redact,
                self._fields,
                output / f"documents-{number:05d}.{options.file_format}",
                self._work / f"written-{number:05d}.json",
            )
            for number, (start, stop) in enumerate(plan_files(measured.column("text_bytes"), kept, options.file_bytes))
        ]
        self._run(write_file, tasks, [task.entry for task in tasks], "writing", "file")
        files = [read_json(task.entry, "record of a written file") for task in tasks]
        for path in set(output.glob("documents-*")) - {task.output for task in tasks}:
            path.unlink()  # of a killed run with other options
        write_rejected(output / REMOVED, measured, decisions)
        write_atomically(output / REJECTED, encode_skipped(self._inputs.skipped))
        write_atomically(output / INPUTS_RECORD, encode_record(versions_of(self._inputs.pieces)))
        write_atomically(output / CARD, cleaned_card(options.file_format, manifest))
        assert sum(entry["documents"] for entry in files) == manifest["documents"]
        manifest |= {
            "text_bytes": sum(entry.pop("text_bytes") for entry in files),  # after redaction
            "kept_by": {what: add_up(entry["by"][what] for entry in files) for what in files[0]["by"]},
            "files": [{key: value for key, value in entry.items() if key != "by"} for entry in files],
            "digest": digest_json([entry["xxh3_128"] for entry in files]),
        }
        write_json(output / MANIFEST, manifest)
        return manifest

    def _run(
        self,
        function: Callable[[AnyTask], Any],
        tasks: Sequence[AnyTask],
        outputs: Sequence[Path],
        what: str,
        unit: str = "task",
    ) -> None:
        """Run the tasks whose output does not exist. Raises ClusterError if an output does not appear."""
        unfinished = [task for task, output in zip(tasks, outputs, strict=True) if not output.exists()]
        workers = self._options.workers or available_cores()
        results = run_tasks(function, unfinished, workers, engine=self._options.engine)
        for _ in progress(results, what, len(tasks), unit, done=len(tasks) - len(unfinished)):
            pass
        missing = sum(not output.exists() for output in outputs)
        if missing and not self._is_finished():  # else another slice has removed them
            disk = "Set TMPDIR to a directory" if self._options.dry_run else "Name an output directory"
            raise ClusterError(
                f"{missing:,} of {len(tasks):,} tasks ran ({what}), but their results are not in {self._work}. "
                f"{disk} on a disk that all workers share."
            )

"""Collect source files from this machine into a corpus: gzip-compressed JSON Lines and a manifest.

The result depends only on the files found and the options: documents are sorted by the digest of their content, so the
directory listing order does not matter, and `sample_bytes` takes a uniform sample.
"""

import dataclasses
import importlib.metadata
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from codeparrot_ds.corpus.card import CARD, CORPUS_CARD
from codeparrot_ds.corpus.output import require_ours
from codeparrot_ds.corpus.projects import Project, Projects
from codeparrot_ds.corpus.writers import open_writer
from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.source import EncodingError, decode_source
from codeparrot_ds.documents.walk import (
    OTHER_SUFFIX,
    REJECTED,
    Skipped,
    has_suffix,
    list_reasons,
    require_suffix,
    walk,
)
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_file,
    digest_json,
    finished_manifest,
    flush_to_disk,
    make_directory,
    require_free_space,
    write_atomically,
    write_json,
)
from codeparrot_ds.system.inputs_record import INPUTS_RECORD, Files, encode_record, require_same_inputs
from codeparrot_ds.system.jobs import progress
from codeparrot_ds.system.paths import printable_name, stored_address, text_of
from codeparrot_ds.system.storage import LocalDirectory

_DOCUMENT_FILE_BYTES = 8_000_000  # of text per file: small enough that a few workers share a small corpus
_WRITTEN = ("documents-[0-9]*.jsonl.gz", REJECTED, INPUTS_RECORD, CARD)  # before the manifest
_PACKAGES = {"site-packages", "dist-packages"}
_GZIP_RATIO = 0.35  # compressed size of Python source, measured 0.25 to 0.30 at level 6


@dataclass(frozen=True, slots=True)
class Candidate:
    """A source file that may become a document."""

    file: Path
    repository: str
    path: str
    licence: str
    source: str
    commit: str
    size: int  # bytes
    modified: int  # ns


class Rejected(msgspec.Struct, frozen=True, order=True, omit_defaults=True):
    """A file that is not in the corpus, or a directory that was not searched: a line of `rejected.jsonl`.

    Attributes:
        repository, path: as in a Document.
        reason: one of a few, so that they can be counted.
        detail: more about this one: of a duplicate, the repository and path of the file that is kept.
    """

    repository: str
    path: str
    reason: str
    detail: str = ""


def collect(
    output: Path,
    directories: Sequence[Path],
    *,
    installed_python: bool = False,
    suffixes: Sequence[str] = (".py",),
    max_file_bytes: int = 1_000_000,
    sample_bytes: int | None = None,
) -> dict[str, Any]:
    """Collect source files into the corpus directory `output` and return its manifest.

    Args:
        output: created if missing; a finished corpus of the same files and options is kept unchanged.
        directories: searched recursively, except hidden directories and those of tools; symbolic links are not
            followed. A file in a git working tree gets the repository, its licence and its commit as provenance.
        installed_python: also collect the standard library and the installed packages of this interpreter.
        suffixes: suffixes of the files to collect.
        max_file_bytes: larger files are counted and skipped.
        sample_bytes: stop at this many bytes of text, choosing the documents with the smallest digests.

    The manifest counts whatever was found and is not in the corpus, by reason, and `rejected.jsonl` names it.

    Raises:
        ConfigError: a directory is missing, a suffix is not the end of a file name, `output` holds other files or
            cannot be written, or the disk is too small.
        DataError: no source file was found, or `output` contains a corpus of other options or files.
    """
    options = {
        "directories": [str(directory) for directory in directories],
        "installed_python": installed_python,
        "suffixes": sorted(set(suffixes)),
        "max_file_bytes": max_file_bytes,
        "sample_bytes": sample_bytes,
    }
    for directory in directories:
        if not directory.is_dir():
            if directory.exists():
                raise ConfigError(f"{directory}: not a directory. Name the directory that contains the source files.")
            raise ConfigError(f"{directory}: no such directory to collect from. Check the name.")
    endings = tuple(map(require_suffix, suffixes))
    rejected: list[Rejected] = []
    candidates: list[Candidate] = []
    files: Files = {}
    for directory in directories:
        projects = Projects(directory.resolve())
        candidates += _files_below(projects, endings, rejected)
        files |= projects.versions()
    if installed_python:
        candidates += _installed_python(endings, rejected)
    files |= {printable_name(text_of(c.file)): (c.size, str(c.modified)) for c in candidates}
    if finished := _finished(output, options, files):
        return finished

    require_ours(output, _WRITTEN)
    chosen = _choose(candidates, max_file_bytes, sample_bytes, rejected)
    skipped = dict(sorted(Counter(each.reason for each in rejected).items()))
    if not chosen:
        places = ", ".join(str(directory) for directory in directories) or "this Python installation"
        counts = f" (not read: {list_reasons(skipped)})" if skipped else ""
        raise DataError(
            f"no {' or '.join(suffixes)} files found in {places}{counts}. Name directories that contain source code."
        )
    make_directory(output)
    total_bytes = sum(size for _, size, _ in chosen)
    require_free_space(output, int(total_bytes * _GZIP_RATIO), "the corpus")
    written = _write(output, chosen, max_file_bytes)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "corpus",
        "options": {**options, "directories": [stored_address(str(each), output) for each in directories]},
        "documents": len(chosen),
        "repositories": len({candidate.repository for _, _, candidate in chosen}),
        "text_bytes": total_bytes,
        "without_commit": sum(not candidate.commit for _, _, candidate in chosen),
        "skipped": skipped,
        "files": written,
        "digest": digest_json([entry["xxh3_128"] for entry in written]),
    }
    write_atomically(output / REJECTED, b"".join(msgspec.json.encode(each) + b"\n" for each in sorted(rejected)))
    write_atomically(output / INPUTS_RECORD, encode_record(files))
    if not (output / CARD).exists():
        write_atomically(output / CARD, CORPUS_CARD)
    write_json(output / MANIFEST, manifest)
    return manifest


def other_suffixes(corpus: Path) -> list[tuple[str, int]]:
    """Suffixes of the files that were not collected because of them, with their numbers; the most frequent first."""
    counts: Counter[str] = Counter()
    for line in (corpus / REJECTED).read_bytes().splitlines():
        rejected = msgspec.json.decode(line, type=Rejected)
        if rejected.reason == OTHER_SUFFIX:
            counts[PurePosixPath(rejected.path).suffix or "without a suffix"] += 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _finished(output: Path, options: dict[str, Any], files: Files) -> dict[str, Any] | None:
    """The manifest in `output`, or None. Raises DataError for a corpus of other options or files."""
    if (output / MANIFEST).exists() and (output / INPUTS_RECORD).exists():
        # The record has absolute paths, while the same directories may be named in several ways.
        stored = finished_manifest(output, "corpus", {}) or {}
        options = {**options, "directories": stored.get("options", {}).get("directories")}
    finished = finished_manifest(output, "corpus", {"options": options})
    if finished:
        require_same_inputs(LocalDirectory(output), "corpus", files)
    return finished


def _files_below(projects: Projects, suffixes: tuple[str, ...], rejected: list[Rejected]) -> Iterator[Candidate]:
    """Yield candidates below a directory, and append what else is there to `rejected`."""
    entries = list(walk(projects.root, follow_links=False))
    projects.add(entry.path for entry in entries if isinstance(entry, Skipped))
    for entry in entries:
        project, path = projects.of(entry.path if isinstance(entry, Skipped) else entry.name)
        if isinstance(entry, Skipped):
            rejected.append(_rejected(project.repository, path, entry.reason, entry.detail))
        elif not any(has_suffix(entry.name, suffix) for suffix in suffixes):
            rejected.append(_rejected(project.repository, path, OTHER_SUFFIX))
        else:
            facts = (project.repository, path, project.licence, "directory", project.commit)
            yield Candidate(entry.path, *facts, entry.size, entry.modified)


def _rejected(repository: str, path: str, reason: str, detail: str = "") -> Rejected:
    return Rejected(*map(printable_name, (repository, path, reason, detail)))


def _installed_python(suffixes: tuple[str, ...], rejected: list[Rejected]) -> list[Candidate]:
    """Candidates from this interpreter's standard library and installed packages, with names and licences."""
    site_packages = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")}
    standard_library = Path(sysconfig.get_path("stdlib")).resolve()
    of_library: list[Rejected] = []
    version = f"cpython-{platform.python_version()}"
    library = list(_files_below(Projects(standard_library, Project(version, "PSF-2.0")), suffixes, of_library))
    found = [candidate for candidate in library if not _PACKAGES & set(Path(candidate.path).parts)]
    rejected += [each for each in of_library if not _PACKAGES & set(Path(each.path).parts)]
    for parent in sorted(standard_library.rglob("*-packages")):
        if parent.name in _PACKAGES and parent.resolve() not in site_packages:
            path = parent.relative_to(standard_library).as_posix()
            rejected.append(_rejected(version, path, "packages of another environment"))
    for root in sorted(site_packages):
        owners = _distributions_by_file(root)
        for candidate in _files_below(Projects(root, Project(root.name)), suffixes, rejected):
            repository, licence = owners.get(candidate.path, ("site-packages", ""))
            found.append(
                dataclasses.replace(candidate, repository=repository, licence=licence, source="installed-python")
            )
    return found


def _distributions_by_file(root: Path) -> dict[str, tuple[str, str]]:
    """Map each file below `root`, by relative path, to (name-version, licence) of the distribution that owns it."""
    owners: dict[str, tuple[str, str]] = {}
    for distribution in importlib.metadata.distributions(path=[str(root)]):
        metadata = distribution.metadata
        licences = [metadata[key].strip() for key in ("License-Expression", "License") if key in metadata]
        licence = next((text.splitlines()[0][:80] for text in licences if text), "")
        owner = (f"{metadata['Name']}-{distribution.version}", licence)
        for file in distribution.files or []:
            owners[file.as_posix()] = owner
    return owners


def _read_text(candidate: Candidate, max_file_bytes: int) -> str:
    """The text of a candidate. Raises ValueError with the reason if it is to be skipped."""
    try:
        candidate.path.encode()
    except UnicodeEncodeError:
        raise ValueError("name not UTF-8") from None
    try:
        size = candidate.file.stat().st_size
        if size > max_file_bytes:
            raise ValueError("too large")
        text = decode_source(candidate.file.read_bytes(), candidate.path)
    except OSError:
        raise ValueError("unreadable") from None
    if not text.strip():
        raise ValueError("empty")
    return text


def _document(candidate: Candidate, text: str) -> Document:
    provenance = (candidate.repository, candidate.path, candidate.licence, candidate.source)
    return Document(text, *provenance, commit=candidate.commit)


def _choose(
    candidates: Sequence[Candidate], max_file_bytes: int, sample_bytes: int | None, rejected: list[Rejected]
) -> list[tuple[str, int, Candidate]]:
    """(digest, bytes, candidate) of the documents to keep, sorted by digest: deduplicated, and sampled if requested.

    Only digests and sizes are held in memory. Of duplicates, the first by repository and path is kept.
    """
    unique: dict[str, tuple[int, Candidate]] = {}
    ordered = sorted(candidates, key=lambda c: (c.repository, c.path))
    for candidate in progress(ordered, "reading source files", len(ordered)):
        try:
            text = _read_text(candidate, max_file_bytes)
        except EncodingError as error:
            rejected.append(_rejected(candidate.repository, candidate.path, error.reason, error.detail))
            continue
        except ValueError as reason:
            rejected.append(_rejected(candidate.repository, candidate.path, str(reason)))
            continue
        digest = _document(candidate, text).digest()
        if digest in unique:
            kept = unique[digest][1]
            rejected.append(
                _rejected(candidate.repository, candidate.path, "duplicate", f"{kept.repository} {kept.path}")
            )
        else:
            unique[digest] = (len(text.encode()), candidate)
    chosen: list[tuple[str, int, Candidate]] = []
    kept_bytes = 0
    for digest, (size, candidate) in sorted(unique.items()):
        if sample_bytes is not None and kept_bytes + size > sample_bytes:
            break
        chosen.append((digest, size, candidate))
        kept_bytes += size
    for _, (_, candidate) in sorted(unique.items())[len(chosen) :]:
        rejected.append(_rejected(candidate.repository, candidate.path, "beyond the sample"))
    return chosen


def _write(output: Path, chosen: Sequence[tuple[str, int, Candidate]], max_file_bytes: int) -> list[dict[str, Any]]:
    """Write the document files and return their manifest entries."""
    files: list[dict[str, Any]] = []
    start = 0
    while start < len(chosen):
        end, text_bytes = start, 0
        while end < len(chosen) and (end == start or text_bytes + chosen[end][1] <= _DOCUMENT_FILE_BYTES):
            text_bytes += chosen[end][1]
            end += 1
        path = output / f"documents-{len(files):05d}.jsonl.gz"
        temporary = path.with_name(f".{path.name}.tmp")
        with open_writer(temporary, "jsonl.gz") as writer:
            for digest, _, candidate in chosen[start:end]:
                try:
                    document = _document(candidate, _read_text(candidate, max_file_bytes))
                except ValueError:
                    document = None
                if document is None or document.digest() != digest:
                    raise DataError(f"{candidate.file}: changed while it was being collected. Run the command again.")
                writer.append(document)
        flush_to_disk(temporary)
        temporary.replace(path)
        files.append(
            {
                "name": path.name,
                "documents": end - start,
                "bytes": path.stat().st_size,
                "xxh3_128": digest_file(path),
            }
        )
        start = end
    return files

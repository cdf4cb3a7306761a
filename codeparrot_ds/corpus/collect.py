"""Collect source files from this machine into a corpus: gzip-compressed JSON Lines and a manifest.

The result depends only on the files found and the options: documents are sorted by the digest of their content, so the
directory listing order does not matter, and `sample_bytes` takes a uniform sample.
"""

import gzip
import importlib.metadata
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.documents.document import Document
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.system.files import (
    FORMAT_VERSION,
    MANIFEST,
    digest_file,
    digest_json,
    finished_manifest,
    make_directory,
    require_free_space,
    write_json,
)
from codeparrot_ds.system.jobs import progress

_SKIPPED_DIRECTORIES = {".git", "__pycache__", "node_modules", ".venv", ".tox"}
_DOCUMENT_FILE_BYTES = 8_000_000  # of text per file: small enough that a few workers share a small corpus
_GZIP_RATIO = 0.35  # compressed size of Python source, measured 0.25 to 0.30 at level 6


@dataclass(frozen=True, slots=True)
class Candidate:
    """A source file that may become a document."""

    file: Path
    repository: str
    path: str
    licence: str
    source: str


def collect(
    output: Path,
    directories: Sequence[Path],
    *,
    installed_python: bool = False,
    suffix: str = ".py",
    max_file_bytes: int = 1_000_000,
    sample_bytes: int | None = None,
) -> dict[str, Any]:
    """Collect source files into the corpus directory `output` and return its manifest.

    Args:
        output: created if missing; a finished corpus with the same options is kept unchanged.
        directories: searched recursively, without following symbolic links.
        installed_python: also collect the standard library and the installed packages of this interpreter.
        suffix: suffix of the files to collect.
        max_file_bytes: larger files are counted and skipped.
        sample_bytes: stop at this many bytes of text, choosing the documents with the smallest digests.

    Raises:
        ConfigError: a directory is missing, `output` cannot be written, or the disk is too small.
        DataError: no source file was found, or `output` contains another corpus.
    """
    options = {
        "directories": [str(directory) for directory in directories],
        "installed_python": installed_python,
        "suffix": suffix,
        "max_file_bytes": max_file_bytes,
        "sample_bytes": sample_bytes,
    }
    if finished := finished_manifest(output, "corpus", {"options": options}):
        return finished
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: no such directory to collect from. Check the name.")
    candidates = [c for directory in directories for c in _files_below(directory, suffix)]
    if installed_python:
        candidates += _installed_python(suffix)

    skipped: Counter[str] = Counter()
    chosen = _choose(candidates, max_file_bytes, sample_bytes, skipped)
    if not chosen:
        places = ", ".join(str(directory) for directory in directories) or "this Python installation"
        raise DataError(
            f"no {suffix} files found in {places} (skipped: {dict(skipped) or 'none'}). "
            "Name directories that contain source code."
        )
    make_directory(output)
    total_bytes = sum(size for _, size, _ in chosen)
    require_free_space(output, int(total_bytes * _GZIP_RATIO), "the corpus")
    files = _write(output, chosen)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "corpus",
        "options": options,
        "documents": len(chosen),
        "text_bytes": total_bytes,
        "skipped": dict(sorted(skipped.items())),
        "files": files,
        "digest": digest_json([entry["xxh3_128"] for entry in files]),
    }
    write_json(output / MANIFEST, manifest)
    return manifest


def _files_below(root: Path, suffix: str, repository: str = "", licence: str = "") -> Iterator[Candidate]:
    """Yield candidates below `root`, without following symbolic links."""
    root = root.resolve()
    for parent, directories, names in os.walk(root):
        directories[:] = [name for name in directories if name not in _SKIPPED_DIRECTORIES]
        for name in names:
            file = Path(parent) / name
            if name.endswith(suffix) and file.is_file() and not file.is_symlink():
                path = file.relative_to(root).as_posix()
                yield Candidate(file, repository or root.name, path, licence, "directory")


def _installed_python(suffix: str) -> list[Candidate]:
    """Candidates from this interpreter's standard library and installed packages, with names and licences."""
    site_packages = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")}
    standard_library = Path(sysconfig.get_path("stdlib")).resolve()
    found = [
        candidate
        for candidate in _files_below(standard_library, suffix, f"cpython-{platform.python_version()}", "PSF-2.0")
        if not {"site-packages", "dist-packages"} & set(candidate.file.parts)
    ]
    for root in sorted(site_packages):
        owners = _distributions_by_file(root)
        for candidate in _files_below(root, suffix):
            repository, licence = owners.get(candidate.path, ("site-packages", ""))
            found.append(Candidate(candidate.file, repository, candidate.path, licence, "installed-python"))
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
        text = candidate.file.read_bytes().decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except OSError:
        raise ValueError("unreadable") from None
    if not text.strip():
        raise ValueError("empty")
    return text


def _document(candidate: Candidate, text: str) -> Document:
    return Document(text, candidate.repository, candidate.path, candidate.licence, candidate.source)


def _choose(
    candidates: Sequence[Candidate], max_file_bytes: int, sample_bytes: int | None, skipped: Counter[str]
) -> list[tuple[str, int, Candidate]]:
    """(digest, bytes, candidate) of the documents to keep, sorted by digest: deduplicated, and sampled if requested.

    Only digests and sizes are held in memory. Of duplicates, the first by repository and path is kept.
    """
    unique: dict[str, tuple[int, Candidate]] = {}
    ordered = sorted(candidates, key=lambda c: (c.repository, c.path))
    for candidate in progress(ordered, "reading source files", len(ordered)):
        try:
            text = _read_text(candidate, max_file_bytes)
        except ValueError as reason:
            skipped[str(reason)] += 1
            continue
        digest = _document(candidate, text).digest()
        if digest in unique:
            skipped["duplicate"] += 1
        else:
            unique[digest] = (len(text.encode()), candidate)
    chosen: list[tuple[str, int, Candidate]] = []
    kept_bytes = 0
    for digest, (size, candidate) in sorted(unique.items()):
        if sample_bytes is not None and kept_bytes + size > sample_bytes:
            break
        chosen.append((digest, size, candidate))
        kept_bytes += size
    if len(chosen) < len(unique):
        skipped["beyond the sample"] = len(unique) - len(chosen)
    return chosen


def _write(output: Path, chosen: Sequence[tuple[str, int, Candidate]]) -> list[dict[str, Any]]:
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
        # No name and no time in the gzip header, so that the bytes depend only on the documents.
        with open(temporary, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as out:
            for digest, _, candidate in chosen[start:end]:
                document = _document(candidate, candidate.file.read_bytes().decode())
                if document.digest() != digest:
                    raise DataError(f"{candidate.file}: changed while it was being collected. Run the command again.")
                out.write(document.to_json().encode())
            out.close()
            raw.flush()
            os.fsync(raw.fileno())
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

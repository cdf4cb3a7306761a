"""Find a command's input files, and split them into tasks of similar size based on the file list alone."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec

from codeparrot_ds.documents.document import Document
from codeparrot_ds.documents.hub import open_hub_dataset
from codeparrot_ds.documents.read import Piece, printable_name, read_local
from codeparrot_ds.errors import DataError
from codeparrot_ds.system.files import MANIFEST, digest_json, read_manifest
from codeparrot_ds.system.storage import filesystem, is_remote, open_binary

_KINDS = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".jsonl.zstd": "jsonl",
    ".json": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
    ".parquet": "parquet",
}
# Bytes of text per byte of file, used only for planning. Measured on Python source: gzip 3.9, zstandard 4.2, parquet 3.
_EXPANSION = {".gz": 3.9, ".zst": 4.2, ".zstd": 4.2, ".parquet": 3.0}
_SKIPPED_DIRECTORIES = {".git", "__pycache__", "node_modules", ".venv", ".tox"}


@dataclass(frozen=True)
class Corpus:
    """A finished corpus directory: its manifest, and its document files in order."""

    directory: Path
    files: tuple[Path, ...]
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> "Corpus":
        """Open `directory` and check that all its files exist with the expected size. Raises DataError."""
        manifest = read_manifest(directory, "corpus", "codeparrot-ds corpus collect")
        try:
            entries = [(entry["name"], entry["bytes"]) for entry in manifest["files"]]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{directory / MANIFEST}: incomplete manifest ({error}). Collect the corpus again."
            ) from None
        files = []
        for name, expected in entries:
            path = directory / name
            size = path.stat().st_size if path.exists() else 0
            if size != expected:
                raise DataError(
                    f"{path}: {size:,} bytes, the manifest says {expected:,}. Copy it again, or run "
                    "`codeparrot-ds corpus collect` again."
                )
            files.append(path)
        return cls(directory, tuple(files), manifest)

    @property
    def digest(self) -> str:
        """Digest of the contents of all document files."""
        return str(self.manifest["digest"])

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            yield from read_local(file)


def find_inputs(arguments: Sequence[str], suffix: str | None = None) -> list[Piece]:
    """Find the input files named by `arguments`, in the order of the arguments and sorted within each.

    Args:
        arguments: each a corpus directory, a directory or a file of JSON Lines or parquet, a glob, an fsspec URL
            ("s3://bucket/prefix", "hf://datasets/NAME/data/*.parquet"), or "hub:NAME" for a Hub dataset to stream
            with `datasets`.
        suffix: read files with this suffix as one document each, instead of data files.

    Returns:
        One piece per file (per part of a Hub dataset), not split further.

    Raises:
        DataError: an argument matches nothing, or an input is named twice.
    """
    pieces: list[Piece] = []
    for argument in arguments:
        argument = argument.removeprefix("file://").removeprefix("local://")
        if not argument:
            raise DataError(
                "an input argument is empty, possibly from an unset shell variable. Name a file, a directory or a URL."
            )
        if argument.startswith("hub:"):
            found = _find_hub(argument)
        elif is_remote(argument):
            found = _find_remote(argument, suffix)
        else:
            found = _find_local(argument, suffix)
        if not found:
            wanted = f"files ending in {suffix}" if suffix else f"data files ({', '.join(_KINDS)})"
            raise DataError(
                f"{argument}: contains no {wanted}. Name other input, or read source files as documents with --suffix "
                ".py."
            )
        pieces += found
    seen: set[tuple[str, int]] = set()
    for piece in pieces:
        _require_utf8(piece)
        key = (piece.address if is_remote(piece.address) else os.path.realpath(piece.address), piece.start)
        if key in seen:
            raise DataError(f"{piece.address}: named twice among the inputs. Remove one, or it is trained on twice.")
        seen.add(key)
    return pieces


def _require_utf8(piece: Piece) -> None:
    """Manifests and provenance are UTF-8, so file names must be too. Source files are checked by their reader."""
    if piece.kind != "file" and printable_name(piece.address) != piece.address:
        raise DataError(f"{printable_name(piece.address)}: its name is not UTF-8. Rename it.")


def _kind(name: str) -> str | None:
    """The kind of a data file according to its suffix, or None."""
    return next((kind for end, kind in _KINDS.items() if name.lower().endswith(end)), None)


def _find_local(argument: str, suffix: str | None) -> list[Piece]:
    root = Path(argument)
    if root.is_dir():
        if suffix is None and _is_ours(root):
            corpus = Corpus.open(root)
            digests = [entry.get("xxh3_128", "") for entry in corpus.manifest["files"]]
            found = [_local_piece(path, path.name) for path in corpus.files]
            return [msgspec.structs.replace(p, digest=digest) for p, digest in zip(found, digests, strict=True)]
        below = sorted(
            path
            for path in root.rglob(f"*{suffix or ''}")
            if path.is_file()
            and not (suffix and path.is_symlink())  # data files may be links into a cache
            and path.name != MANIFEST
            and not _SKIPPED_DIRECTORIES & set(path.relative_to(root).parts)
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
        name = root.resolve().name
        if suffix is not None:
            return [_local_piece(path, path.relative_to(root).as_posix(), "file", name) for path in below]
        return [_local_piece(path, path.relative_to(root).as_posix()) for path in below if _kind(path.name)]
    files = [argument]
    if has_magic(argument) and not root.exists():
        files = sorted(glob(argument, recursive=True))  # noqa: PTH207 (a user's pattern may be absolute)
    return [_local_piece(Path(file), Path(file).name, "file" if suffix else None) for file in files]


def _is_ours(directory: Path) -> bool:
    """Whether this package wrote the manifest in `directory`; other software also uses the name manifest.json."""
    try:
        body = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and {"format_version", "kind"} <= body.keys()


def _local_piece(path: Path, name: str, kind: str | None = None, repository: str = "") -> Piece:
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file or directory. Check the name.") from None
    kind = kind or _kind(path.name)
    if kind is None:
        raise DataError(
            f"{path}: not a supported file type ({', '.join(_KINDS)}). Correct its suffix, or read it as one document "
            "with --suffix."
        )
    return Piece(
        os.path.abspath(path),  # noqa: PTH100 (does not resolve links; workers may run in another directory)
        printable_name(name),
        kind,
        facts.st_size,
        stamp=str(facts.st_mtime_ns),
        repository=printable_name(repository),
    )


def _find_remote(argument: str, suffix: str | None) -> list[Piece]:
    fs, path = filesystem(argument)
    try:
        found = fs.glob(path, detail=True) if has_magic(path) else fs.find(path, detail=True)
    except FileNotFoundError:
        found = {}
    except Exception as error:  # each store has its own exceptions
        raise DataError(
            f"{argument}: cannot be listed ({type(error).__name__}: {error}). Check the address, the network and the "
            "credentials in the environment."
        ) from error
    pieces = []
    for name, facts in sorted(found.items()):
        if facts.get("type", "file") != "file" or (suffix and not name.endswith(suffix)):
            continue
        kind = "file" if suffix else _kind(name)
        if kind is None:
            continue
        below = name.removeprefix(path).strip("/") if not has_magic(path) else PurePosixPath(name).name
        stamp = str(facts.get("ETag") or facts.get("etag") or facts.get("mtime") or facts.get("LastModified") or "")
        root = PurePosixPath(path).name
        address = fs.unstrip_protocol(name)
        pieces.append(
            Piece(
                address,
                below or PurePosixPath(name).name,
                kind,
                int(facts.get("size") or 0),
                stamp=stamp,
                repository=root if suffix else "",
            )
        )
    return pieces


def _find_hub(argument: str) -> list[Piece]:
    """One piece per part of the dataset (usually one of its files)."""
    parts = int(open_hub_dataset(argument).num_shards)
    called = argument.removeprefix("hub:")
    name, _, query = called.partition("?")
    options = dict(parse_qsl(query))
    revision = _hub_revision(name, options.get("revision"))
    address = argument
    if revision and not Path(name).is_dir():  # pin the revision, so that all workers read the same data
        address = f"hub:{name}?{urlencode({**options, 'revision': revision})}"
    return [Piece(address, called, "hub", 0, part, parts, digest=revision) for part in range(parts)]


def _hub_revision(name: str, revision: str | None) -> str:
    """Identify the version of a dataset: its commit, or for a local directory a digest of file sizes and times.

    Empty if the Hub is not reachable.
    """
    directory = Path(name)
    if directory.is_dir():
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return digest_json([[str(f.relative_to(directory)), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(name, revision=revision).sha or ""
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return ""


def text_bytes(piece: Piece) -> float:
    """Estimated bytes of text in a whole file; 0 if unknown."""
    return piece.size * _EXPANSION.get(PurePosixPath(piece.address).suffix, 1.0)


def deal(pieces: Sequence[Piece], task_bytes: float) -> list[list[Piece]]:
    """Group pieces, in order, into tasks of about `task_bytes` of text.

    Splits large files if their format allows it, and combines small ones. Depends only on its arguments.
    """
    tasks: list[list[Piece]] = []
    filled = 0.0
    for piece in _split(pieces, task_bytes):
        size = text_bytes(piece) if piece.whole else task_bytes  # a part has the requested size
        if not tasks or filled + size > task_bytes:
            tasks.append([])
            filled = 0.0
        tasks[-1].append(piece)
        filled += size
    return tasks


def _split(pieces: Iterable[Piece], task_bytes: float) -> Iterator[Piece]:
    for piece in pieces:
        parts = int(-(-text_bytes(piece) // task_bytes))
        if parts <= 1 or not piece.whole:
            yield piece
        elif piece.kind == "jsonl" and re.search(r"\.jsonl?$", piece.address):
            bounds = [piece.size * part // parts for part in range(parts)] + [piece.size]
            for start, stop in pairwise(bounds):
                yield msgspec.structs.replace(piece, start=start, stop=stop)
        elif piece.kind == "parquet":
            groups = _row_groups(piece)
            bounds = sorted({groups * part // parts for part in range(parts)} | {groups})
            for start, stop in pairwise(bounds):
                yield msgspec.structs.replace(piece, start=start, stop=stop)
        else:
            yield piece


def _row_groups(piece: Piece) -> int:
    """Number of row groups in a parquet file. Raises DataError when it is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_binary(piece.address) as file:
        try:
            return int(pq.ParquetFile(file).num_row_groups)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{piece.address}: damaged parquet ({error}). Copy the file again.") from None

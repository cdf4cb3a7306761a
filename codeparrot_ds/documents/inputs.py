"""Find a command's input files; whatever is not read is named with the reason."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, urlencode

import msgspec

from codeparrot_ds.documents.archives import list_members
from codeparrot_ds.documents.corpora import Corpus
from codeparrot_ds.documents.deal import deal, text_bytes
from codeparrot_ds.documents.formats import SUPPORTED, format_of
from codeparrot_ds.documents.hub import open_hub_dataset
from codeparrot_ds.documents.piece import Piece
from codeparrot_ds.documents.walk import (
    BROKEN_LINK,
    NOT_REGULAR,
    OTHER_SUFFIX,
    QUARANTINE,
    REJECTED,
    REMOVED,
    SYMBOLIC_LINK,
    UNREADABLE_DIRECTORY,
    UNSUPPORTED,
    Entry,
    Skipped,
    count_reasons,
    has_suffix,
    list_reasons,
    require_suffix,
    skipped_by_name,
    walk,
)
from codeparrot_ds.errors import DataError, list_problems
from codeparrot_ds.system.files import MANIFEST, digest_json
from codeparrot_ds.system.inputs_record import INPUTS_RECORD
from codeparrot_ds.system.paths import expand_address, is_remote, path_of, printable_name, text_of
from codeparrot_ds.system.storage import explain_store_errors, filesystem

__all__ = ["Corpus", "Inputs", "deal", "find_inputs", "search_inputs", "text_bytes"]

_RECORDS = {REJECTED, REMOVED, QUARANTINE, INPUTS_RECORD}  # no data, beside a manifest of ours
_RECORD = "record of a corpus or of shards"
_MANIFEST = "manifest"
_ARCHIVE_IN_ARCHIVE = "archive inside an archive"


@dataclass
class Inputs:
    """What the input arguments lead to.

    Attributes:
        pieces: one per file (per part of a Hub dataset, per member of an archive), not split further.
        skipped: files that are not read and directories that are not searched, each with the reason.
        counts: number of pieces of each argument; they are in the order of the arguments.
    """

    pieces: list[Piece] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def find_inputs(arguments: Sequence[str], suffix: str | None = None) -> list[Piece]:
    """The pieces of `search_inputs`."""
    return search_inputs(arguments, suffix).pieces


def search_inputs(arguments: Sequence[str], suffix: str | None = None) -> Inputs:
    """Find the input files named by `arguments`, in the order of the arguments and sorted within each.

    Args:
        arguments: each a corpus directory, a directory or a file of JSON Lines, CSV, parquet or zip, a glob, an fsspec
            URL ("s3://bucket/prefix", "hf://datasets/NAME/data/*.parquet"), or "hub:NAME" for a dataset on the Hub.
        suffix: read files with this suffix as one document each, instead of data files.

    Raises:
        ConfigError: `suffix` is not the end of a file name.
        DataError: an argument matches nothing, an input is named twice, or a directory or link cannot be read.
    """
    inputs = Inputs()
    suffix = None if suffix is None else require_suffix(suffix)
    for number, argument in enumerate(arguments):
        argument = str(expand_address(argument.removeprefix("file://").removeprefix("local://")))
        if not argument:
            raise DataError(
                "an input argument is empty, possibly from an unset shell variable. Name a file, a directory or a URL."
            )
        if argument.startswith("hub:"):
            found = Inputs(_find_hub(argument))
        elif is_remote(argument):
            found = _find_remote(argument, suffix)
        else:
            found = _find_local(argument, suffix)
        found.skipped = sorted(set(found.skipped))  # a glob with ** matches a directory and what is in it
        if not found.pieces:
            wanted = f"files ending in {suffix}" if suffix else f"data files ({SUPPORTED})"
            counts = list_reasons(count_reasons(found.skipped))
            raise DataError(
                f"{argument}: contains no {wanted}{f'; not read: {counts}' if counts else ''}. Name other input, or "
                "read source files as documents with --suffix .py."
            )
        inputs.pieces += found.pieces
        inputs.counts.append(len(found.pieces))
        inputs.skipped += [
            msgspec.structs.replace(each, input=number, path=printable_name(each.path)) for each in found.skipped
        ]
    seen: set[tuple[str, str, int]] = set()
    for piece in inputs.pieces:
        _require_utf8(piece)
        address = piece.address if is_remote(piece.address) else text_of(os.path.realpath(path_of(piece.address)))
        key = (address, piece.member, piece.start)
        if key in seen:
            raise DataError(f"{piece.location}: named twice among the inputs. Name it once, or it is read twice.")
        seen.add(key)
    return inputs


def _require_utf8(piece: Piece) -> None:
    """Manifests and provenance are UTF-8, so file names must be too. Source files are checked by their reader."""
    if piece.kind != "file" and printable_name(piece.address) != piece.address:
        raise DataError(f"{printable_name(piece.address)}: its name is not UTF-8. Rename it.")


def _find_local(argument: str, suffix: str | None) -> Inputs:
    root = Path(argument)
    if root.is_dir():
        return _find_below(root, suffix)
    if not has_magic(argument) or os.path.lexists(root):
        return _find_named(root, suffix)
    found = Inputs()
    base = _before_magic(argument)
    wanted = text_of(argument.removeprefix(base))
    done: set[str] = set()
    for match in sorted(glob(argument, recursive=True, include_hidden=True), key=text_of):  # noqa: PTH207 (may be absolute)
        path, name = Path(match), text_of(match.removeprefix(base))
        if hidden := skipped_by_name(name.rstrip("/"), wanted, is_directory=path.is_dir()):
            found.skipped.append(hidden)
            continue
        matched = _find_below(path, suffix, name) if path.is_dir() else Inputs()
        if not path.is_dir():
            _add_file(matched, path, text_of(path.name), name, suffix)
        found.pieces += [piece for piece in matched.pieces if piece.location not in done]
        found.skipped += matched.skipped
        done.update(piece.location for piece in matched.pieces)
    return found


def _before_magic(pattern: str) -> str:
    """The directories of a glob above its first wildcard, with the final slash."""
    parts = pattern.split("/")
    fixed = next(number for number, part in enumerate(parts) if has_magic(part))
    return "".join(f"{part}/" for part in parts[:fixed])


def _find_named(path: Path, suffix: str | None) -> Inputs:
    """A file that an argument names. Raises DataError when it cannot be read."""
    if not path.exists():
        raise DataError(f"{path}: no such file or directory. Check the name.")
    if not path.is_file():
        raise DataError(f"{path}: not a regular file, and input is read more than once. Save it to a file first.")
    form = format_of(path.name)
    if form is None and suffix is None:
        raise DataError(
            f"{path}: not a supported file type ({SUPPORTED}). Correct its suffix, or read it as one document with "
            "--suffix."
        )
    found = Inputs()
    name = text_of(path.name)
    _add_piece(found, _local_piece(path, name, "file" if suffix or form is None else form.kind), name)
    return found


def _find_below(root: Path, suffix: str | None, name: str = "") -> Inputs:
    """What a directory holds; `name` is its path relative to the input argument."""
    found = Inputs()
    if suffix is None and _is_ours(root):
        corpus = Corpus.open(root)
        digests = [entry.get("xxh3_128", "") for entry in corpus.manifest["files"]]
        pieces = [_local_piece(path, path.name, _kind(path.name)) for path in corpus.files]
        return Inputs([msgspec.structs.replace(p, digest=d) for p, d in zip(pieces, digests, strict=True)])
    prefix = f"{name.rstrip('/')}/" if name else ""
    unreadable = []
    entries = sorted(walk(root, follow_links=suffix is None), key=_order)  # data files may be links into a cache
    for entry in entries:
        if isinstance(entry, Entry):
            _add_file(found, entry.path, entry.name, f"{prefix}{entry.name}", suffix, text_of(root.resolve().name))
            continue
        wanted = has_suffix(entry.path, suffix) if suffix else format_of(entry.path) is not None
        if entry.reason == UNREADABLE_DIRECTORY or (entry.reason == BROKEN_LINK and wanted):
            where = root / entry.path if entry.path != "." else root
            unreadable.append(f"{printable_name(text_of(where))}: {entry.reason} ({entry.detail})")
        found.skipped.append(msgspec.structs.replace(entry, path=f"{prefix}{entry.path}"))
    if unreadable:
        raise DataError(
            list_problems(str(root), unreadable, "Make it readable, or remove it, so that no document is missed.")
        )
    return found


def _kind(name: str) -> str:
    """The kind of a corpus's file. Raises DataError for a name that no corpus has."""
    found = format_of(name)
    if found is None:
        raise DataError(f"{name}: the manifest lists this file, but files of this type are not read.")
    return found.kind


def _order(entry: Entry | Skipped) -> list[str]:
    return (entry.path if isinstance(entry, Skipped) else entry.name).split("/")


def _add_file(
    found: Inputs, path: Path, name: str, skipped_name: str, suffix: str | None, repository: str = ""
) -> None:
    """Add a file that was found in a directory or matched by a glob: its pieces, or why it is not read."""
    kind = _kind_or_reason(text_of(path.name), suffix)
    if path.name in _RECORDS and _is_ours(path.parent):
        found.skipped.append(Skipped(0, skipped_name, _RECORD))
    elif isinstance(kind, Skipped):
        found.skipped.append(msgspec.structs.replace(kind, path=skipped_name))
    elif suffix and path.is_symlink():
        found.skipped.append(Skipped(0, skipped_name, SYMBOLIC_LINK))
    elif not path.is_file():
        found.skipped.append(Skipped(0, skipped_name, NOT_REGULAR if path.exists() else BROKEN_LINK))
    else:
        _add_piece(found, _local_piece(path, name, kind, repository if suffix else ""), skipped_name)


def _kind_or_reason(name: str, suffix: str | None) -> str | Skipped:
    """The kind of a file that was not named itself, or the reason why it is not read."""
    if suffix:
        return "file" if has_suffix(name, suffix) else Skipped(0, name, OTHER_SUFFIX)
    if name == MANIFEST:
        return Skipped(0, name, _MANIFEST)
    form = format_of(name)
    return form.kind if form else Skipped(0, name, UNSUPPORTED)


def _add_piece(found: Inputs, piece: Piece, skipped_name: str) -> None:
    """Add a file; for an archive its members, each by its own suffix."""
    if piece.kind != "zip":
        found.pieces.append(piece)
        return
    try:
        with piece.open() as file:
            members = list_members(file)
    except ValueError:
        found.pieces.append(piece)  # its reader says what is wrong
        return
    for member in members:
        kind = _kind_or_reason(PurePosixPath(member.name).name, None)
        hidden = skipped_by_name(member.name)
        if hidden:
            found.skipped.append(msgspec.structs.replace(hidden, path=f"{skipped_name}/{hidden.path}"))
        elif isinstance(kind, Skipped):
            found.skipped.append(msgspec.structs.replace(kind, path=f"{skipped_name}/{member.name}"))
        elif kind == "zip":
            found.skipped.append(Skipped(0, f"{skipped_name}/{member.name}", _ARCHIVE_IN_ARCHIVE))
        else:
            name = printable_name(f"{piece.name}/{member.name}")
            facts = {"size": member.size, "stamp": f"{piece.stamp} {member.checksum}", "member": member.name}
            kind = "zip" if member.refusal else kind  # its reader says why
            found.pieces.append(msgspec.structs.replace(piece, name=name, kind=kind, **facts))


def _is_ours(directory: Path) -> bool:
    """Whether this package wrote the manifest in `directory`; other software also uses the name manifest.json."""
    try:
        return _is_our_manifest((directory / MANIFEST).read_bytes())
    except OSError:
        return False


def _is_our_manifest(content: bytes) -> bool:
    try:
        body = json.loads(content)
    except ValueError:
        return False
    return isinstance(body, dict) and {"format_version", "kind"} <= body.keys()


def _local_piece(path: Path, name: str, kind: str, repository: str = "") -> Piece:
    facts = path.stat()
    return Piece(
        text_of(os.path.abspath(path)),  # noqa: PTH100 (does not resolve links; workers may run in another directory)
        printable_name(name),
        kind,
        facts.st_size,
        stamp=str(facts.st_mtime_ns),
        repository=printable_name(repository),
    )


def _find_remote(argument: str, suffix: str | None) -> Inputs:
    fs, path = filesystem(argument)
    try:
        listed = fs.glob(path, detail=True) if has_magic(path) else fs.find(path, detail=True)
        for name in [name for name, facts in listed.items() if facts.get("type") == "directory"]:
            listed.update(fs.find(name, detail=True))  # what a glob matches is searched
    except FileNotFoundError:
        listed = {}
    except Exception as error:  # each store has its own exceptions
        raise DataError(
            f"{argument}: cannot be listed ({type(error).__name__}: {error}). Check the address, the network and the "
            "credentials in the environment."
        ) from error
    base = _before_magic(path) if has_magic(path) else f"{path.rstrip('/')}/"
    found = Inputs()
    for address, facts in sorted(listed.items()):
        if facts.get("type", "file") != "file":
            continue
        name = address.removeprefix(base) if address.startswith(base) else PurePosixPath(address).name
        named = address == path  # not found in a directory: not left out because of its name
        if not named and (hidden := skipped_by_name(name, path.removeprefix(base))):
            found.skipped.append(hidden)
            continue
        kind = _kind_or_reason(PurePosixPath(name).name, suffix)
        manifest = str(PurePosixPath(address).with_name(MANIFEST))
        if not named and PurePosixPath(name).name in _RECORDS and fs.exists(manifest):
            with explain_store_errors(argument, DataError):
                kind = Skipped(0, name, _RECORD) if _is_our_manifest(fs.cat_file(manifest)) else kind
        if isinstance(kind, Skipped):
            found.skipped.append(msgspec.structs.replace(kind, path=name))
            continue
        stamp = str(facts.get("ETag") or facts.get("etag") or facts.get("mtime") or facts.get("LastModified") or "")
        piece = Piece(
            fs.unstrip_protocol(address),
            name if not has_magic(path) else PurePosixPath(name).name,
            kind,
            int(facts.get("size") or 0),
            stamp=stamp,
            repository=PurePosixPath(path).name if suffix else "",
        )
        _add_piece(found, piece, name)
    return found


def _find_hub(argument: str) -> list[Piece]:
    """One piece per part of the dataset (usually one of its files); "split=train+validation" stands for both splits."""
    name, _, query = argument.partition("?")
    # parse_qsl takes "+" for a blank, which is in no name of a split.
    options = dict(parse_qsl(query))
    splits = options.get("split", "").split()
    if len(splits) < 2:
        return _find_split(argument)
    return [piece for split in splits for piece in _find_split(f"{name}?{urlencode({**options, 'split': split})}")]


def _find_split(argument: str) -> list[Piece]:
    parts = open_hub_dataset(argument).parts
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

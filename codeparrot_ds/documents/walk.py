"""List files below a directory or in a listing of an object store; whatever is left out is named with the reason."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.system.paths import text_of

REJECTED = "rejected.jsonl"  # lists what was skipped, beside a manifest that has the counts
REMOVED = "rejected.parquet"  # lists the documents that were removed, beside the manifest of a cleaned corpus
QUARANTINE = "quarantine.jsonl"  # lists bad documents, beside the manifest of shards
TOOL_DIRECTORIES = {".git", "__pycache__", "node_modules", ".venv", ".tox", "__MACOSX"}
HIDDEN_FILE, HIDDEN_DIRECTORY = "hidden file", "hidden directory"
TOOL_DIRECTORY = "directory of caches or dependencies"
SYMBOLIC_LINK, LINK_TO_DIRECTORY, BROKEN_LINK = "symbolic link", "link to a directory", "broken link"
NOT_REGULAR = "not a regular file"
OTHER_SUFFIX, UNSUPPORTED = "other suffix", "unsupported file type"
UNREADABLE_DIRECTORY = "unreadable directory"


class Entry(msgspec.Struct, frozen=True):
    """A regular file.

    Attributes:
        path: where it is.
        name: path relative to the directory that was walked, with forward slashes; see `system.paths.text_of`.
        size: bytes.
        modified: modification time (ns).
    """

    path: Path
    name: str
    size: int
    modified: int


class Skipped(msgspec.Struct, frozen=True, order=True):
    """A file that is not read, or a directory that is not searched.

    Attributes:
        input: index of the argument below which it was found.
        path: relative to that argument, with forward slashes.
        reason: one of a few, so that they can be counted.
        detail: more about this one, e.g. the error.
    """

    input: int
    path: str
    reason: str
    detail: str = ""


def require_suffix(suffix: str) -> str:
    """Return a suffix that was given, as text. Raises ConfigError for a pattern, a path or a list."""
    text = text_of(suffix)
    if not text or set(text) & set("*?[]{},;/\\ "):
        raise ConfigError(f"suffix {suffix!r}: must be the end of a file name, such as .py.")
    return text


def has_suffix(path: str, suffix: str) -> bool:
    """Whether a file is of a suffix: "py" stands for ".py", and for the whole of a name without a suffix."""
    if not suffix.isalnum():
        return path.endswith(suffix)
    return path.endswith(f".{suffix}") or path.rpartition("/")[2] == suffix


def walk(root: Path, *, follow_links: bool) -> Iterator[Entry | Skipped]:
    """Yield everything below `root`, each directory's entries sorted by name.

    Directories that are hidden, of tools, or links are not searched, so links cannot form a cycle. Links to files are
    followed on request.
    """
    pending = [(root, "")]
    while pending:
        directory, prefix = pending.pop()
        try:
            with os.scandir(directory) as listing:
                entries = sorted(listing, key=lambda entry: text_of(entry.name))
        except OSError as error:
            yield Skipped(0, prefix.rstrip("/") or ".", UNREADABLE_DIRECTORY, error.strerror or str(error))
            continue
        below = []
        for entry in entries:
            name = f"{prefix}{text_of(entry.name)}"
            found = _examine(entry, name, follow_links)
            if found is None:
                below.append((Path(entry.path), f"{name}/"))
            else:
                yield found
        pending += reversed(below)


def _examine(entry: "os.DirEntry[str]", name: str, follow_links: bool) -> Entry | Skipped | None:
    """What a directory entry is; None for a directory to search."""
    try:
        if entry.is_dir(follow_symlinks=False):
            reason = _reason_for_directory(entry.name)
            return Skipped(0, name, reason) if reason else None
        if entry.name.startswith("."):
            return Skipped(0, name, HIDDEN_FILE)
        if entry.is_symlink():
            if entry.is_dir():
                return Skipped(0, name, LINK_TO_DIRECTORY)
            if not follow_links:
                return Skipped(0, name, SYMBOLIC_LINK)
        facts = entry.stat()
    except OSError as error:  # the target is missing, links to itself, or lies in a directory without permission
        return Skipped(0, name, BROKEN_LINK if entry.is_symlink() else NOT_REGULAR, error.strerror or str(error))
    if not stat.S_ISREG(facts.st_mode):
        return Skipped(0, name, NOT_REGULAR)
    return Entry(Path(entry.path), name, facts.st_size, facts.st_mtime_ns)


def _reason_for_directory(name: str) -> str:
    if name in TOOL_DIRECTORIES:
        return TOOL_DIRECTORY
    return HIDDEN_DIRECTORY if name.startswith(".") else ""


def skipped_by_name(name: str, pattern: str = "", *, is_directory: bool = False) -> Skipped | None:
    """The file or the directory above it that is skipped because of its name, for a file of a flat listing.

    Args:
        name: path with forward slashes, relative to what was listed.
        pattern: the glob that matched it. What it names explicitly is not skipped: "*/.cache/*" reads that directory.
        is_directory: whether it is a directory itself.
    """
    parts = name.split("/")
    named = [part for part in pattern.split("/") if part.startswith(".") or part in TOOL_DIRECTORIES]
    for depth, part in enumerate(parts, start=1):
        if depth < len(parts) or is_directory:
            reason = _reason_for_directory(part)
        else:
            reason = HIDDEN_FILE if part.startswith(".") else ""
        if reason and not any(fnmatchcase(part, each) for each in named):
            return Skipped(0, "/".join(parts[:depth]), reason)
    return None


def count_reasons(skipped: Iterable[Skipped]) -> dict[str, int]:
    """Number of skipped files and directories by reason, for a manifest."""
    return dict(sorted(Counter(each.reason for each in skipped).items()))


def list_reasons(counts: Mapping[str, int]) -> str:
    """The counts of `count_reasons` for a message."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def encode_skipped(skipped: Sequence[Skipped]) -> bytes:
    """The lines of `rejected.jsonl`, sorted."""
    lines = []
    for each in sorted(set(skipped)):
        body = {"input": each.input, "path": each.path, "reason": each.reason}
        lines.append(msgspec.json.encode({**body, "detail": each.detail} if each.detail else body))
    return b"".join(line + b"\n" for line in lines)

"""Atomic file writes, digests, locks, and the manifest that marks every finished directory as complete."""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from codeparrot_ds.errors import ConfigError, DataError, UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1  # of every manifest
_READ_SIZE = 1 << 20
_LOCK_SECONDS, _LOCK_INTERVAL_SECONDS = 1.0, 0.02
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")  # what `Path` leaves of "s3://"


def flush_to_disk(path: Path) -> None:
    """fsync one file or directory; a rename is durable only after its directory is flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_write_back(file: BinaryIO) -> None:
    """Ask the kernel to start writing back the dirty pages of `file`, so that a later fsync waits for less.

    Linux only; a no-op elsewhere. Usually returns immediately and gives no durability guarantee.
    """
    if sys.platform == "linux":
        file.flush()
        start = end = ctypes.c_int64(0)  # the whole file
        _libc().sync_file_range(file.fileno(), start, end, _SYNC_FILE_RANGE_WRITE)


def drop_from_cache(path: Path) -> None:
    """Drop the cached pages of a file that will not be read again soon.

    This keeps the kernel from evicting pages that others need and frees clean memory.
    """
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Atomically replace `path` with `content`: after a crash it holds either the old or the new bytes, never a mix."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
    flush_to_disk(path.parent)


def read_user_text(path: Path) -> str:
    """A text file that a user wrote, without the byte order mark that some editors put first."""
    return path.read_bytes().decode("utf-8-sig", "surrogateescape")


def dump_json(value: Any) -> bytes:
    """Serialize `value` as indented UTF-8 JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Atomically write `value` as indented JSON."""
    write_atomically(path, dump_json(value))


def require_empty(path: Path) -> None:
    """Raise ConfigError unless `path` is absent or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: already exists. Name another directory, or remove this one first.")


def open_work(parent: Path, name: str, same: str) -> Path:
    """Create the directory `name` for work in progress, with its parents, and remove its siblings.

    Work in a directory called `same` is continued: it becomes this one.
    """
    work, other = parent / name, parent / same
    if other.is_dir() and not work.exists():
        other.rename(work)
    for each in parent.glob("*"):
        if each.is_dir() and each != work:  # of other input or options
            shutil.rmtree(each, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    return work


@contextmanager
def publish_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory next to `path`; rename it to `path` on success, delete it on failure.

    Raises ConfigError when `path` is not empty, so that no user data is overwritten, or when another process is
    creating it.
    """
    path = path.resolve()  # "." has no name from which to derive a sibling
    require_empty(path)
    temporary = path.with_name(f".{path.name}.tmp")
    make_directory(temporary)
    busy = f"{path}: another process is creating it now. Wait for it, or name another directory."
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _hold(descriptor, temporary, busy)
        if not temporary.exists() or not os.path.samestat(os.fstat(descriptor), temporary.stat()):
            raise ConfigError(busy)  # the other process finished, or gave up, in the meantime
        for leftover in temporary.iterdir():  # from a process that was killed
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                flush_to_disk(file)
            flush_to_disk(temporary)
            temporary.replace(path)  # `path` is absent or an empty directory
            flush_to_disk(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def digest_bytes(data: bytes | memoryview) -> str:
    """xxh3-128 of `data`, 32 hex digits. Detects accidental corruption; not a defence against tampering."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, read in 1 MiB blocks."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_READ_SIZE):
            digest.update(piece)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """xxh3-128 of the canonical JSON of `value`; independent of key order."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; error messages call it `what`, e.g. "shard manifest". Raises DataError."""
    try:
        return parse_json(path.read_bytes(), str(path), what)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, so there is no {what} here.") from None
    except OSError as error:
        raise DataError(f"{path}: this {what} cannot be read ({error.strerror}).") from None


def parse_json(data: bytes, path: str, what: str) -> Any:
    """Parse `data`, the content of the JSON file `path`; error messages call it `what`. Raises DataError."""
    try:
        return json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: this {what} is not valid JSON ({error}). Recreate it.") from None


def read_manifest(directory: Path, kind: str, maker: str = "") -> dict[str, Any]:
    """Read the manifest of a finished `directory` of this `kind` ("corpus", "shards", …), created by command `maker`.

    Raises DataError when there is none, or when it has another kind or format version.
    """
    path = directory / MANIFEST
    body = read_json(path, f"{kind} manifest" + (f" (`{maker}` creates it)" if maker else ""))
    return check_manifest(body, str(path), kind)


def parse_manifest(data: bytes, path: str, kind: str) -> dict[str, Any]:
    """Parse `data`, the content of the manifest file `path`, as a manifest of this `kind`. Raises DataError."""
    return check_manifest(parse_json(data, path, f"{kind} manifest"), path, kind)


def check_manifest(body: Any, path: str, kind: str) -> dict[str, Any]:
    """Return `body` if it is a manifest of this `kind` in the current format. Raises DataError otherwise."""
    if not isinstance(body, dict) or body.get("kind") != kind or body.get("format_version") != FORMAT_VERSION:
        found = body.get("kind") if isinstance(body, dict) else type(body).__name__
        raise DataError(f"{path}: a manifest of {found!r}; expected {kind!r} in format version {FORMAT_VERSION}.")
    return body


def finished_manifest(directory: Path, kind: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of `directory` if it is finished, else None.

    Args:
        directory: output directory that an earlier call may have finished.
        kind: manifest kind, e.g. "corpus".
        expected: keys and values that the manifest must contain, so that a second call never returns the result
            of different options.

    Raises:
        DataError: the directory is finished but was built with different options.
    """
    if not (directory / MANIFEST).exists():
        return None
    manifest = read_manifest(directory, kind)
    differing = [key for key, value in expected.items() if manifest.get(key) != value]
    if differing:
        shown = ", ".join(f"{key} = {manifest.get(key)!r}, requested {expected[key]!r}" for key in differing)
        raise DataError(
            f"{directory}: contains a finished {kind} that was built with different options ({shown}). "
            "Name another output directory, or remove this one."
        )
    return manifest


def make_directory(path: Path) -> Path:
    """Create `path` and its parents, and check that it is writable. Raises ConfigError, also for a URL."""
    if any(_SCHEME.fullmatch(part) for part in path.parts):
        raise ConfigError(f"{path}: is a URL, but must be a local directory. Name one, and copy the result from there.")
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path}: a link to {path.resolve()}, which does not exist. Create that, or remove the link.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-probe-{secrets.token_hex(8)}.tmp"  # unique: several hosts may do this at the same time
        probe.touch()
        probe.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{path}: is a file, but must be a directory. Name another path.") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot write here ({os.strerror(error.errno or 0)}). Choose a writable directory, or fix its "
            "permissions."
        ) from None
    return path


def require_file_place(path: Path) -> None:
    """Raise ConfigError if the file `path` cannot be written; its directory is created. Before work, not after it."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory, but must be a file. Name a file in it.")
    make_directory(path.parent)


def require_free_space(directory: Path, needed_bytes: int, purpose: str) -> None:
    """Raise ConfigError unless the file system of `directory` has `needed_bytes` free for `purpose`."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{directory}: {purpose} needs about {needed_bytes / 1e6:,.0f} MB, but only {free_bytes / 1e6:,.0f} MB "
            "are free. Free some space, or name a directory on a larger disk."
        )


def _lock(descriptor: int) -> None:
    """Take a lock, with retries.

    A process that only tests it (`codeparrot-ds status`) holds it for a moment, and so do the workers of a process that
    was killed: they were forked with the lock, and end when the kernel has told them.
    """
    give_up = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < give_up:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_INTERVAL_SECONDS)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def exclusive_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold an advisory lock on `path`; the kernel releases it when the process exits. Raises ConfigError(`busy`)."""
    with open(path, "w", encoding="utf-8") as file:
        _hold(file.fileno(), path, busy)
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds `exclusive_lock` on `path`. Needs no write permission. True if it cannot be told."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError as error:  # locked, or no permission; a file system without locks has no holder
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EPERM)


def _hold(descriptor: int, path: Path, busy: str) -> None:
    try:
        _lock(descriptor)
    except BlockingIOError:
        raise ConfigError(busy) from None
    except OSError as error:
        # EBADF: NFS only locks files that are open for writing, which a directory never is.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF):
            raise
        print(
            f"note: {path}: this file system has no locks; make sure that no other process writes here.",
            file=sys.stderr,
        )


def as_user_error(error: Exception) -> UserError | None:
    """The error that a user can fix behind `error`: itself, or what explains it; None if there is none."""
    if isinstance(error, UserError):
        return error
    return explain_os_error(error) if isinstance(error, OSError) else None


def explain_os_error(error: OSError) -> UserError | None:
    """The user error behind an operating-system error (full disk, no permission), or None if there is none."""
    name = error.filename
    where = name.decode(errors="backslashreplace") if isinstance(name, bytes) else name or "the output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(f"{where}: the disk is full. Free some space and run the same command again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"{where}: permission denied. Choose another path, or fix its permissions.")
    return None

"""Files that are whole or absent, digests, locks and the manifests that every finished directory ends with."""

import ctypes
import errno
import fcntl
import json
import os
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
_LOCK_TRIES = 10
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def flush_to_disk(path: Path) -> None:
    """fsync one file or directory; a rename is durable only once its directory is flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_write_back(file: BinaryIO) -> None:
    """Have the kernel begin to write what is in its cache of `file`, so that a later fsync has less to wait for.

    Linux only; elsewhere nothing. Usually returns at once, and promises nothing.
    """
    if sys.platform == "linux":
        file.flush()
        start = end = ctypes.c_int64(0)  # the whole file
        _libc().sync_file_range(file.fileno(), start, end, _SYNC_FILE_RANGE_WRITE)


def drop_from_cache(path: Path) -> None:
    """Have the kernel forget what it has cached of a file that will not be read again soon, so that it need not drop
    what others need, and has clean memory at hand."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment it holds the old bytes or the new, never a mix."""
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f"{path.name}.tmp")
    with open(beside, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    beside.replace(path)
    flush_to_disk(path.parent)


def dump_json(value: Any) -> bytes:
    """`value` as readable JSON in UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or absent."""
    write_atomically(path, dump_json(value))


@contextmanager
def publish_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`; it becomes `path` when the block ends well, and goes otherwise.

    Raises ConfigError when `path` already holds something, so that nothing of the user's is replaced, or another
    process is making it.
    """
    path = path.resolve()  # "." has no name to put another beside
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: already exists. Name another directory, or remove this one first.")
    beside = path.with_name(f".{path.name}.tmp")
    make_directory(beside)
    busy = f"{path}: another process is making it now. Wait for it, or name another directory."
    descriptor = os.open(beside, os.O_RDONLY)
    try:
        _hold(descriptor, beside, busy)
        if not beside.exists() or not os.path.samestat(os.fstat(descriptor), beside.stat()):
            raise ConfigError(busy)  # it was finished, or given up, in this moment
        for leftover in beside.iterdir():  # of a process that was killed
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        try:
            yield beside
            for file in sorted(beside.rglob("*")):
                flush_to_disk(file)
            flush_to_disk(beside)
            beside.replace(path)  # onto an empty directory at most
            flush_to_disk(path.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def digest_bytes(data: bytes | memoryview) -> str:
    """xxh3-128 of `data`, 32 hex digits. Finds accidents; it is not a defence against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, read in 1 MiB pieces."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_READ_SIZE):
            digest.update(piece)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """xxh3-128 of the canonical JSON of `value`: the same for equal values whatever the order of keys."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def read_json(path: Path, what: str) -> Any:
    """Parse one JSON file; `what` names it in the message, e.g. "shard manifest". Raises DataError."""
    try:
        return parse_json(path.read_bytes(), str(path), what)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, so there is no {what} here.") from None
    except OSError as error:
        raise DataError(f"{path}: this {what} cannot be read ({error.strerror}).") from None


def parse_json(data: bytes, path: str, what: str) -> Any:
    """Parse the content of the file called `path`; `what` names it in the message. Raises DataError."""
    try:
        return json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: this {what} is not valid JSON ({error}). Make it again.") from None


def read_manifest(directory: Path, kind: str, maker: str = "") -> dict[str, Any]:
    """The manifest of a finished `directory` of this `kind` ("corpus", "shards", …), made by the command `maker`.

    Raises DataError when there is none, or when it is of another kind or a later format.
    """
    path = directory / MANIFEST
    body = read_json(path, f"{kind} manifest" + (f" (it is made by `{maker}`)" if maker else ""))
    return check_manifest(body, str(path), kind)


def parse_manifest(data: bytes, path: str, kind: str) -> dict[str, Any]:
    """The manifest of this `kind` in the content of the file called `path`. Raises DataError."""
    return check_manifest(parse_json(data, path, f"{kind} manifest"), path, kind)


def check_manifest(body: Any, path: str, kind: str) -> dict[str, Any]:
    """`body` if it is a manifest of this `kind` in our format. Raises DataError."""
    if not isinstance(body, dict) or body.get("kind") != kind or body.get("format_version") != FORMAT_VERSION:
        found = body.get("kind") if isinstance(body, dict) else type(body).__name__
        raise DataError(f"{path}: a manifest of {found!r}, not of {kind!r} in format version {FORMAT_VERSION}.")
    return body


def finished_manifest(directory: Path, kind: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished `directory`, or None when there is nothing finished there yet.

    Args:
        directory: what an earlier call may have made.
        kind: of the manifest, e.g. "corpus".
        expected: keys that must be equal in the manifest, so that a second call never passes off another
            result as its own.

    Raises:
        DataError: it is finished, but was built with different options.
    """
    if not (directory / MANIFEST).exists():
        return None
    manifest = read_manifest(directory, kind)
    differing = [key for key, value in expected.items() if manifest.get(key) != value]
    if differing:
        shown = ", ".join(f"{key} = {manifest.get(key)!r}, asked for {expected[key]!r}" for key in differing)
        raise DataError(
            f"{directory}: holds a finished {kind} that was built with different options ({shown}). "
            "Name another output directory, or remove this one."
        )
    return manifest


def make_directory(path: Path) -> Path:
    """Create `path` and its parents and see that files can be made in it. Raises ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-probe-{secrets.token_hex(8)}.tmp"  # several hosts may try at once
        probe.touch()
        probe.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{path}: is a file, but a directory is needed. Name another place.") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot write here ({os.strerror(error.errno or 0)}). Choose a directory that you may "
            "write to, or mend its permissions."
        ) from None
    return path


def require_free_space(directory: Path, needed_bytes: int, purpose: str) -> None:
    """Raise ConfigError unless the file system of `directory` has `needed_bytes` free for `purpose`."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{directory}: {purpose} needs about {needed_bytes / 1e6:,.0f} MB and {free_bytes / 1e6:,.0f} MB are "
            "free. Free some space, or name a directory on a larger disk."
        )


def _lock(descriptor: int) -> None:
    """Take a lock. Who only looks whether it is held, as `codeparrot-ds status` does, holds it for a moment."""
    for _ in range(_LOCK_TRIES):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def exclusive_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold an advisory lock on `path`; the kernel drops it with the process. Raises ConfigError(`busy`)."""
    with open(path, "w") as file:
        _hold(file.fileno(), path, busy)
        yield


def _hold(descriptor: int, path: Path, busy: str) -> None:
    try:
        _lock(descriptor)
    except BlockingIOError:
        raise ConfigError(busy) from None
    except OSError as error:
        # EBADF: NFS locks only what is open for writing, which no directory can be.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF):
            raise
        print(f"note: {path}: this file system has no locks; see that nobody else works here.", file=sys.stderr)


def as_user_error(error: Exception) -> UserError | None:
    """The error that a user can fix behind `error`: itself, or what explains it; None if there is none."""
    if isinstance(error, UserError):
        return error
    return explain_os_error(error) if isinstance(error, OSError) else None


def explain_os_error(error: OSError) -> UserError | None:
    """The user's side of an operating-system error (full disk, no permission), or None if it is ours."""
    where = error.filename or "the output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(f"{where}: the disk is full. Free some space and run the same command again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"{where}: permission denied. Choose another place, or mend its permissions.")
    return None

"""Output directories: on a local disk, or in an object store supported by fsspec (s3://, hf://, gs://, …).

Both have the same interface, and both publish files atomically: a file under its final name is complete.
"""

import io
import secrets
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

from codeparrot_ds.errors import ConfigError, DataError, UserError
from codeparrot_ds.system.files import flush_to_disk, make_directory
from codeparrot_ds.system.paths import Address, bytes_of, expand_address, is_remote


def filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises ConfigError when its package is not installed."""
    import fsspec

    protocol = address.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise ConfigError(
            f"{address}: {protocol}:// requires a package that is not installed ({error}). "
            f"Install it, e.g. `pip install {_PACKAGES.get(protocol, 'fsspec[' + protocol + ']')}`."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{address}: unknown file system ({error}).") from None
    return fs, path


_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


@contextmanager
def explain_store_errors(address: str, error_class: type[UserError]) -> Iterator[None]:
    """Convert any store-specific exception into an `error_class` that says what to check."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise error_class(
            f"{address}: cannot be read or written ({type(error).__name__}: {reason}). Check the address, the network "
            "and the credentials in the environment, and run the same command again."
        ) from error


@contextmanager
def open_binary(address: str) -> Iterator[IO[bytes]]:
    """Open a local file (see `system.paths.text_of`) or a remote one for unbuffered binary reading, as it is."""
    if is_remote(address):
        with _RemoteFile(address) as remote:
            yield cast(IO[bytes], remote)
    else:
        with open(bytes_of(address), "rb", buffering=0) as file:
            yield file


class _RemoteFile(io.RawIOBase):
    """A file in an object store.

    Transport errors become a DataError, so that they are not mistaken for a damaged file, which may be skipped.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        with self._explained():
            fs, path = filesystem(address)
            self._file = fs.open(path, "rb", cache_type="readahead")

    def _explained(self) -> AbstractContextManager[None]:
        return explain_store_errors(self._address, DataError)

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """See `io.RawIOBase`."""
        with self._explained():
            return bytes(self._file.read(size))

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """See `io.RawIOBase`."""
        with self._explained():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return int(self._file.tell())

    def close(self) -> None:
        """See `io.RawIOBase`."""
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


class LocalDirectory:
    """A directory on a local or shared file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def make(self) -> None:
        """Create the directory and check that it is writable. Raises ConfigError."""
        make_directory(self.path)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Names of the files in it, sorted; none when it does not exist."""
        return sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading. Raises DataError when it is missing."""
        try:
            return open(self.path / name, "rb")
        except FileNotFoundError:
            raise DataError(f"{self.path / name}: no such file. Copy it again, or recreate it.") from None

    def read(self, name: str) -> bytes:
        """The whole content of a file. Raises DataError when it is missing."""
        with self.open(name) as file:
            return file.read()

    @contextmanager
    def scratch(self) -> Iterator["Scratch"]:
        """Scratch space for unfinished files. Files that were not published are removed when the block ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        scratch = Scratch(self.path, f".{secrets.token_hex(8)}")
        try:
            yield scratch
        finally:
            scratch.clear()

    def publish(self, files: dict[str, Path]) -> None:
        """Rename finished local files to their final names. They are durable when this returns."""
        if not files:
            return
        with ThreadPoolExecutor(len(files)) as threads:  # concurrent fsyncs wait for the disk once, not once per file
            list(threads.map(flush_to_disk, files.values()))
        for name, path in files.items():
            path.replace(self.path / name)
        for directory in {(self.path / name).parent for name in files}:
            flush_to_disk(directory)

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Atomically write a small file; safe to call from several processes at the same time.

        Without `durable`, a power failure may leave the file empty, truncated or missing.
        """
        (self.path / name).parent.mkdir(exist_ok=True)
        with self.scratch() as scratch:
            temporary = scratch.path("write")
            temporary.write_bytes(data)
            if durable:
                self.publish({name: temporary})
            else:
                temporary.replace(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def remove_leftovers(self, older_than_seconds: float = 0.0) -> None:
        """Remove scratch files that have not been modified for `older_than_seconds` (left by killed processes)."""
        for path in self.path.glob(f".*{_SCRATCH_SUFFIX}"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= older_than_seconds:
                    path.unlink()


class RemoteDirectory:
    """A prefix in an object store. A file appears when its upload is complete."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def __str__(self) -> str:
        return self.address

    @cached_property
    def _fs_and_root(self) -> tuple[Any, str]:
        return filesystem(self.address)

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address}  # connections are not shared between processes

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[Any, str]]:
        """The file system and a file's path in it. Errors become ConfigErrors, except FileNotFoundError."""
        missing = None
        with explain_store_errors(self.address, ConfigError):
            fs, root = self._fs_and_root
            try:
                yield fs, f"{root}/{name}"
            except FileNotFoundError as error:
                missing = error
        if missing is not None:
            raise missing

    def make(self) -> None:
        """Check that files can be created in it. Raises ConfigError."""
        probe = f".write-probe-{secrets.token_hex(8)}.tmp"
        try:
            with self._at(probe) as (fs, path):
                if self.address.partition("://")[0] not in _BUCKETS:
                    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                fs.pipe_file(path, b"-")
            self.remove(probe)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.address}: no such bucket ({error}). Create it first, or correct its name."
            ) from None

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        try:
            with self._at(name) as (fs, path):
                fs.invalidate_cache()
                return int(fs.info(path)["size"])
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Names of the files in it, sorted; none when it does not exist."""
        try:
            with self._at("") as (fs, path):
                fs.invalidate_cache()
                return sorted(found.rpartition("/")[2] for found in fs.ls(path.rstrip("/"), detail=False))
        except FileNotFoundError:
            return []

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading. Raises DataError when it is missing."""
        try:
            with self._at(name) as (fs, path):
                return fs.open(path, "rb")
        except FileNotFoundError:
            raise DataError(f"{self.address}/{name}: no such file. Copy it again, or recreate it.") from None

    def read(self, name: str) -> bytes:
        """The whole content of a file. Raises DataError when it is missing."""
        with self._at(name), self.open(name) as file:
            return file.read()

    @contextmanager
    def scratch(self) -> Iterator["Scratch"]:
        """Local scratch space for unfinished files."""
        with tempfile.TemporaryDirectory(prefix="codeparrot-ds-") as directory:
            yield Scratch(Path(directory), "")

    def publish(self, files: dict[str, Path]) -> None:
        """Upload finished local files under their final names."""
        for name, path in files.items():
            with self._at(name) as (fs, target):
                fs.put_file(str(path), target)

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Atomically write a small file; always durable in an object store."""
        with self._at(name) as (fs, path):
            fs.pipe_file(path, data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(name):
            with self._at(name) as (fs, path):
                fs.rm_file(path)

    def remove_leftovers(self, older_than_seconds: float = 0.0) -> None:
        """No-op: unfinished uploads are not visible."""


# Buckets are never created implicitly, so that a typo does not make a new one.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "hf"}
Directory = LocalDirectory | RemoteDirectory
_SCRATCH_SUFFIX = ".tmp"


class Scratch:
    """Local files to be published to a `Directory`. Names are unique, because two copies of a task may run."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self._directory, self._prefix = directory, prefix
        self._paths: dict[str, Path] = {}

    def path(self, name: str) -> Path:
        """Where to write the file that will be published as `name`."""
        return self._paths.setdefault(name, self._directory / f"{self._prefix}-{name}{_SCRATCH_SUFFIX}")

    def clear(self) -> None:
        """Remove files that were not published."""
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def open_directory(address: Address) -> Directory:
    """The directory at a path or URL; nothing is created."""
    address = expand_address(address)
    if is_remote(address):
        if str(address).startswith(("file://", "local://")):
            return LocalDirectory(Path(str(address).partition("://")[2]))
        return RemoteDirectory(str(address))
    return LocalDirectory(Path(address))

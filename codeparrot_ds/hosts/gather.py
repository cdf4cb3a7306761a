"""Fetch checkpoint files from other hosts over ssh, and verify each against its digest."""

import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from codeparrot_ds.errors import ClusterError, list_problems
from codeparrot_ds.hosts.ssh import ssh_command
from codeparrot_ds.run.directory import Checkpoint
from codeparrot_ds.system.files import flush_to_disk, require_free_space
from codeparrot_ds.system.jobs import say

_AT_ONCE = 4
_PIECE_BYTES = 1 << 20


def gather(checkpoint: Checkpoint, hosts: Sequence[str]) -> None:
    """Fetch each missing file from the first of `hosts` that has it at the same path.

    Raises ClusterError naming the files that no host has intact. Files already fetched are kept.
    """
    missing = [name for name in checkpoint.files if not (checkpoint.path / name).is_file()]
    if not missing:
        return
    total = sum(checkpoint.files[name]["bytes"] for name in missing)
    require_free_space(checkpoint.path, total, f"{len(missing)} files from other hosts")
    say(f"{checkpoint.path}: fetching {len(missing)} files, {total / 1e6:,.1f} MB")

    def fetch(name: str) -> str | None:
        wrote = checkpoint.files[name].get("host")
        tried = []
        for host in sorted(hosts, key=lambda host: host != wrote):
            problem = _fetch_from(host, checkpoint, name)
            if problem is None:
                return None
            tried.append(f"{host}: {problem}")
        return f"{name} ({'; '.join(tried)})"

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        problems = list(filter(None, pool.map(fetch, missing)))
    if problems:
        fix = "List the hosts that trained the run, and check that ssh reaches them without a prompt."
        raise ClusterError(
            list_problems(f"{checkpoint.path}: not all files could be fetched from these hosts", problems, fix)
        )


def _fetch_from(host: str, checkpoint: Checkpoint, name: str) -> str | None:
    """Fetch one file. Returns the problem, or None on success."""
    path, entry = checkpoint.path / name, checkpoint.files[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, digest, received = path.with_name(f"{path.name}.tmp"), xxhash.xxh3_128(), 0
    with tempfile.TemporaryFile() as errors, open(partial, "wb") as file:
        process = subprocess.Popen(
            [*ssh_command(host), f"exec cat -- {shlex.quote(str(path.absolute()))}"],  # ssh starts in $HOME
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdout is not None
        try:
            # Bounded by the expected size: a host could send without end.
            while received <= entry["bytes"] and (piece := process.stdout.read(_PIECE_BYTES)):
                received += len(piece)
                digest.update(piece)
                file.write(piece)
        finally:
            process.stdout.close()  # stops a sender that has more data
            process.wait()
            errors.seek(0)
            messages = errors.read(_PIECE_BYTES).decode(errors="replace").strip().splitlines()
    if received == entry["bytes"] and digest.hexdigest() == entry["xxh3_128"]:
        flush_to_disk(partial)
        partial.rename(path)
        return None
    partial.unlink()
    failed = process.returncode and received < entry["bytes"]
    return messages[-1] if failed and messages else "its copy does not match the recorded digest"

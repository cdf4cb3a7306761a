"""Report facts about a host and its links to the others. Reads commands, one JSON line each, and answers with one each.

Standard library only: `doctor` sends this file over ssh to Pythons that may lack all other packages.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

PACKAGES = ("codeparrot-ds", "torch", "deepspeed", "transformers", "tokenizers", "numpy")
_SEND_SECONDS = 0.25
_CHUNK = bytes(1 << 20)
_CONNECT_SECONDS = 5


def facts(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that `doctor` checks.

    wanted: {"names": host names, "shards": directories, "files": directory -> file name -> bytes, "runs": directory,
    "see": a file that should be visible, "ops": names of DeepSpeed operators, "swap": directory or None, "port": master
    port}
    """
    return {
        "time": time.time(),
        "hostname": socket.gethostname(),
        "addresses": {name: _address(name) for name in wanted["names"]},
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": _packages(),
        "source": _source_digest(),
        "gpus": _gpus(),
        "memory_bytes": _available_memory(),
        "disk_bytes": {name: _free(wanted[name]) for name in ("runs", "swap") if wanted.get(name)},
        "temporary_bytes": _free(tempfile.gettempdir()),
        "shards": {path: _digest(os.path.join(path, "manifest.json")) for path in wanted["shards"]},
        "files": {path: _different(path, files) for path, files in wanted.get("files", {}).items()},
        "sees": os.path.exists(wanted["see"]) if wanted.get("see") else None,
        "compiler": shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"),
        "ninja": shutil.which("ninja", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")),
        "ops": {name: _is_built(name) for name in wanted["ops"]},
        "port_free": _can_bind(wanted["port"]),
    }


def _address(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> dict[str, str | None]:
    """Return the versions of this package and of all that it needs, as installed here."""
    found, pending = dict.fromkeys(PACKAGES), list(PACKAGES)
    while pending:
        name = pending.pop()
        found[name] = _version(name)
        for line in importlib.metadata.requires(name) or [] if found[name] is not None else []:
            needed = re.match(r"[\w.-]+", line)
            if needed is None or "extra ==" in line:
                continue
            other = re.sub(r"[-_.]+", "-", needed[0]).lower()
            if other not in found and _version(other) is not None:  # some are for other systems or Python versions
                found[other] = None
                pending.append(other)
    return dict(sorted(found.items()))


def _source_digest() -> str | None:
    """Digest the package's modules: checkouts can differ under the same version."""
    try:
        spec = importlib.util.find_spec("codeparrot_ds")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = next(iter(spec.submodule_search_locations))
    whole = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(root, "**", "*.py"), recursive=True)):
        whole.update(os.path.relpath(path, root).encode() + b"\0")
        with open(path, "rb") as file:
            whole.update(file.read())
    return whole.hexdigest()[:12]


def _gpus() -> list[list[str]]:
    """Return [name, driver, memory] of each GPU, from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if done.returncode == 0]


def _available_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _free(path: str) -> int | None:
    """Return the free bytes on the disk of `path` or its nearest existing parent; None if that is not writable."""
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free if os.access(path, os.W_OK) else None


def _digest(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:12]
    except OSError:
        return None


def _different(directory: str, files: dict[str, int]) -> list[list[Any]]:
    """Return [name, bytes or None if missing] of the files whose size is not that in `files`."""
    found = []
    for name, size in files.items():
        try:
            here: int | None = os.stat(os.path.join(directory, name)).st_size
        except OSError:
            here = None
        if here != size:
            found.append([name, here])
    return found


def _is_built(name: str) -> bool:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    return bool(glob.glob(os.path.join(root, "**", name, name + ".so"), recursive=True))


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def listen() -> int:
    """Start a server that receives and acknowledges other hosts' link measurements. Returns its port."""
    listener = socket.create_server(("", 0), backlog=64)

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve_one, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def _serve_one(connection: socket.socket) -> None:
    with connection:
        connection.settimeout(_CONNECT_SECONDS)
        try:
            received = 0
            while True:
                data = connection.recv(1 << 20)
                received += len(data)
                if not data or data.endswith(b"."):
                    break
            if received:
                connection.sendall(b".")
        except OSError:
            pass


def measure(address: str, port: int) -> dict[str, Any]:
    """Measure the bandwidth (bytes/s) to a listening host. Returns {"error"} if it cannot be reached."""
    try:
        with socket.create_connection((address, port), _CONNECT_SECONDS) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            sent, started = 0, time.perf_counter()
            while time.perf_counter() < started + _SEND_SECONDS:
                sent += connection.send(_CHUNK)
            connection.sendall(b".")
            connection.recv(1)  # everything has arrived
            return {"bandwidth": sent / (time.perf_counter() - started)}
    except OSError as error:
        return {"error": str(error)}


_RANK = """
import importlib, json, os, pkgutil, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer
for name in json.loads(sys.stdin.readline()):
    module = importlib.import_module(name)
    ours = getattr(module, "__path__", []) if name.startswith("codeparrot_ds.") else []
    for each in pkgutil.iter_modules(ours):
        importlib.import_module(name + "." + each.name)
print("{}", file=answers, flush=True)
wanted = json.loads(sys.stdin.readline() or "null")
if wanted is None:
    os._exit(0)
import datetime, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo", init_method=f"tcp://{wanted['address']}:{wanted['port']}",
    rank=wanted["rank"], world_size=wanted["world_size"], timeout=datetime.timedelta(seconds=wanted["seconds"]))
data = torch.zeros(wanted["bytes"] // 4, device="cuda" if cuda else "cpu")
dist.all_reduce(data)
if cuda: torch.cuda.synchronize()
started = time.perf_counter()
for _ in range(3): dist.all_reduce(data)
if cuda: torch.cuda.synchronize()
print(json.dumps({"bytes_per_second": 3 * wanted["bytes"] / (time.perf_counter() - started)}), file=answers, flush=True)
os._exit(0)
"""


class Rank:
    """A process like a rank: it imports what a rank imports, and then takes part in an all-reduce over all hosts."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def imports(self, modules: list[str]) -> dict[str, Any]:
        """Import `modules` and those below them. Returns {}, or {"error"}."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has ended)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        return self._ask(modules)

    def all_reduce(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Run an all-reduce, after `imports`. Returns {"bytes_per_second"} reduced, or {"error"}."""
        timer = threading.Timer(wanted["seconds"], self._process.kill if self._process else lambda: None)
        timer.start()
        try:
            return self._ask(wanted)
        finally:
            timer.cancel()

    def _ask(self, wanted: Any) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return {"error": "not started"}
        try:
            process.stdin.write(json.dumps(wanted).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            pass  # it has ended: see its errors
        line = process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = process.wait()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip().splitlines()
        return {"error": "timed out" if code == -9 else (errors or ["exit code %d" % code])[-1]}


def main() -> None:
    """Answer commands until end of standard input."""
    port = listen()
    rank = Rank()
    calls: dict[str, Any] = {
        "facts": facts,
        "measure": lambda wanted: measure(*wanted),
        "imports": rank.imports,
        "all_reduce": rank.all_reduce,
    }
    for line in sys.stdin.buffer:
        command, argument = json.loads(line)
        try:
            answer = calls[command](argument)
        except Exception as error:
            answer = {"error": "%s: %s" % (type(error).__name__, error)}
        if command == "facts":
            answer["listens"] = port
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

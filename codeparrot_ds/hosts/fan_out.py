"""Start DeepSpeed's launcher on every host over plain ssh, as `deepspeed` does with pdsh, where pdsh is missing.

Usage: python -m codeparrot_ds.hosts.fan_out --hostfile H --environment FILE --master_addr A --master_port P ARGUMENTS
The exit code is the largest over all hosts.
"""

import argparse
import base64
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TextIO

from codeparrot_ds.hosts.hostfile import read_hostfile
from codeparrot_ds.hosts.ssh import remote_script, ssh_command
from codeparrot_ds.hosts.working_directory import LAUNCHER
from codeparrot_ds.system.jobs import die_with_parent


def main() -> int:
    """Run the launchers and print their output, each line prefixed with its host. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--hostfile", type=Path, required=True)
    parser.add_argument("--environment", type=Path, required=True, help="file of NAME=VALUE lines, shell-quoted")
    parser.add_argument("--master_addr", required=True)
    parser.add_argument("--master_port", type=int, required=True)
    options, arguments = parser.parse_known_args()
    hosts = read_hostfile(options.hostfile)
    variables = options.environment.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]
    launcher = launcher_command(hosts, options.master_addr, options.master_port)
    processes, threads = [], []
    for number, host in enumerate(hosts):
        script = remote_script(variables, [*launcher, f"--node_rank={number}", *arguments])
        process = subprocess.Popen(
            [*ssh_command(host), script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        assert process.stdout is not None
        threads.append(threading.Thread(target=copy_lines, args=(host, process.stdout, sys.stdout)))
        threads[-1].start()
        processes.append(process)
    codes = [process.wait() & 0xFF for process in processes]
    for thread in threads:
        thread.join()
    return max(codes)


def launcher_command(slots: Mapping[str, int], master: str, port: int) -> list[str]:
    """Return the command of DeepSpeed's launcher, without the host's --node_rank and the program of the ranks."""
    world = base64.urlsafe_b64encode(json.dumps({host: list(range(count)) for host, count in slots.items()}).encode())
    options = [f"--world_info={world.decode()}", f"--master_addr={master}", f"--master_port={port}", "--quiet"]
    return [sys.executable, "-u", "-m", LAUNCHER, *options]


def copy_lines(host: str, output: IO[bytes], to: TextIO) -> None:
    """Copy `output` to `to`, each line prefixed with the host name."""
    for line in output:
        to.write(f"{host}: {line.decode(errors='replace')}")
        to.flush()


if __name__ == "__main__":
    sys.exit(main())

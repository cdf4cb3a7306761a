"""Run a command of a walk: print it as a user types it, its output, its exit code, and what it used.

CPU seconds and memory (the peak of the summed PSS) are of the command and all its descendants.

Usage: python run.py [--expect CODE] [--interrupt-at TEXT | --kill-at TEXT] -- COMMAND [ARGUMENT ...]
"""

import argparse
import ctypes
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import _PR_SET_CHILD_SUBREAPER, MemorySampler, _wait_for_the_rest


def main() -> int:
    """Return 0 if the command's exit code is the expected one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expect", type=int, default=0, metavar="CODE")
    parser.add_argument("--interrupt-at", default="", metavar="TEXT", help="send SIGINT once a line contains this")
    parser.add_argument("--kill-at", default="", metavar="TEXT", help="send SIGKILL once a line contains this")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sampler = MemorySampler(os.getpid(), with_root=False)
    sampler.start()
    print(f"$ {shlex.join(options.command)}", flush=True)
    process = subprocess.Popen(
        options.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    sent = False
    for line in process.stdout:
        print(line, end="", flush=True)
        for text, number, shown in ((options.interrupt_at, signal.SIGINT, "^C"), (options.kill_at, signal.SIGKILL, "")):
            if text and text in line and not sent:
                sent = True
                process.send_signal(number)
                print(shown, flush=True)
    code = process.wait()
    _wait_for_the_rest()
    sampler.finish()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = f"{usage.ru_utime + usage.ru_stime:.1f} CPU seconds, {sampler.peak_pss_bytes / 1e6:,.0f} MB"
    print(f"[exit code {code}; {used}]\n", flush=True)
    return 0 if code == options.expect else 1


if __name__ == "__main__":
    sys.exit(main())

"""`codeparrot-ds launch`, whose ranks run tests/faults/probe_train.py with its faults.

Usage: probe_launch.py --fault NAME:RANK:STEP ... --marks DIRECTORY launch RECIPE ...
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from codeparrot_ds import cli
from codeparrot_ds.supervision import launch

PROBE = Path(__file__).with_name("probe_train.py")
MODULE = ["--module", "codeparrot_ds.train"]


def main() -> None:
    """Put the probe in the place of the module, and go."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--marks", required=True)
    options, rest = parser.parse_known_args()
    faults = [part for fault in options.fault for part in ("--fault", fault)]
    deepspeed_command = launch.deepspeed_command

    def with_faults(*arguments: Any) -> list[str]:
        command = deepspeed_command(*arguments)
        place = command.index(MODULE[0])
        assert command[place : place + 2] == MODULE
        return [*command[:place], str(PROBE), *command[place + 2 :], *faults, "--marks", options.marks]

    launch.deepspeed_command = with_faults
    sys.argv = ["codeparrot-ds", *rest]
    cli.main()


if __name__ == "__main__":
    main()

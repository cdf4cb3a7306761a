"""Run by ranks: train a recipe, and request a stop during a step, as a scheduler would.

Usage: probe_stop.py RECIPE STEP [--set KEY=VALUE …]
"""

import os
import signal
import sys
from pathlib import Path

from codeparrot_ds import train
from codeparrot_ds.training.loop import Trainer
from codeparrot_ds.training.metrics import Step

arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
recipe, stop_at, *overrides = arguments
train_step = Trainer.train_step


def stop_in_step(self: Trainer) -> Step:
    """Like `train_step`; in the step before `stop_at`, rank 0 receives a stop request."""
    if self.step == int(stop_at) - 1 and self.ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(self)


if __name__ == "__main__":
    Trainer.train_step = stop_in_step  # type: ignore[method-assign]
    train.end(train.main([str(Path(recipe)), *overrides]))

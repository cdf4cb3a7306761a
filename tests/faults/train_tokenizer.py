"""Train a tokenizer in many small tasks: `python -m tests.faults.train_tokenizer INPUT OUTPUT [OPTION=VALUE ...]`."""

import json
import sys
from pathlib import Path

from codeparrot_ds.tokenizer import train as training


def main() -> None:
    """Options are those of `TrainOptions`, as JSON."""
    source, output, *options = sys.argv[1:]
    training._MIN_TASK_BYTES = 20_000
    chosen = {name: json.loads(value) for name, _, value in (each.partition("=") for each in options)}
    training.train(source, Path(output), 700, 32, training.TrainOptions(**chosen))


if __name__ == "__main__":
    main()

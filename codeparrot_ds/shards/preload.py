"""What the local workers of `shards build` share: imported once by the process that they are forked from.

That process has no other threads of ours, so its children inherit the libraries and the loaded tokenizer, as memory
that is shared until written, and start in milliseconds. Nothing depends on it: a worker loads what it does not find.
"""

import os
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet
from isal import igzip

from codeparrot_ds.shards import encoders

LIBRARIES = (pyarrow.parquet, igzip)
TOKENIZER = "CODEPARROT_DS_PRELOAD_TOKENIZER"  # directory, digest and encoder, a line each

with suppress(Exception):  # whatever is wrong with it, the task that needs it says so
    directory, digest, name = os.environ[TOKENIZER].split("\n")
    encoders.load_encoders(Path(directory), digest, name)

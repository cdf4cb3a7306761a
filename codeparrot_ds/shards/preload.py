"""State shared by the local workers of `shards build`: imported once by the process that they are forked from.

That process runs no other threads of this package, so its children inherit the libraries and the loaded tokenizer as
copy-on-write memory and start in milliseconds. This is optional: a worker loads whatever is missing.
"""

import os
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet
from isal import igzip

from codeparrot_ds.shards import encoders

LIBRARIES = (pyarrow.parquet, igzip)
TOKENIZER = "CODEPARROT_DS_PRELOAD_TOKENIZER"  # directory, digest and encoder, one per line

with suppress(Exception):  # the task that needs the tokenizer reports any error
    directory, digest, name = os.environ[TOKENIZER].split("\n")
    encoders.load_encoders(Path(directory), digest, name)

"""What the local workers of `shards build` share: imported once by the process that they are forked from.

Its children inherit the libraries as memory that is shared until written, and start in milliseconds. Nothing depends
on it: a worker imports what it does not find.
"""

import pyarrow.parquet
from isal import igzip

from codeparrot_ds.shards import encoders

LIBRARIES = (pyarrow.parquet, igzip, encoders)

"""State shared by the local workers of `shards build`: imported once by the process that they are forked from.

Its children inherit the libraries as copy-on-write memory and start in milliseconds. This is optional: a worker imports
whatever is missing.
"""

import pyarrow.parquet
from isal import igzip

from codeparrot_ds.shards import encoders

LIBRARIES = (pyarrow.parquet, igzip, encoders)

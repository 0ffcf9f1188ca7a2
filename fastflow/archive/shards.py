"""Old name of `fastflow.archive.results`."""

import warnings

from fastflow.archive import results
from fastflow.archive.results import *  # noqa: F403

SHARD_ROWS, Shards = results.ROWS_PER_FILE, results.ResultFiles
warnings.warn("fastflow.archive.shards is now fastflow.archive.results", DeprecationWarning, stacklevel=2)

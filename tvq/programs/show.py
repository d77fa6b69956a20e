"""`tvq config`: a config in full."""

from ml_collections import ConfigDict

from tvq.config import listing
from tvq.schema import Config


def show(config: Config, before: ConfigDict, source: str) -> int:
    """Prints each field with its meaning, and marks what `source` sets and what the command line changed."""
    print(listing(config, before))
    print(f"\n* set by {source}; > set here; all others are defaults")
    return 0

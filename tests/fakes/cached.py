"""The tvq command, whose processes share compiled programs: python -m tests.fakes.cached ARGUMENTS.

On CPU jax names a program after the process that compiled it, and process 0 alone writes programs down: all
others would compile again at each start, which takes most of a short run's time.
"""

import sys

from jax._src import cache_key  # the key has no public name

from tvq import __main__

if __name__ == "__main__":
    cache_key._hash_accelerator_config = lambda hashed, devices: cache_key._hash_devices(hashed, devices)
    sys.exit(__main__.main())

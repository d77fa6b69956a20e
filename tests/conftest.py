"""One runtime for all tests: eight CPU devices, and an implicit rank promotion is an error."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts what it puts into the background deaf to Ctrl-C, and bash could not mend that in its scripts.
signal.signal(signal.SIGINT, signal.default_int_handler)

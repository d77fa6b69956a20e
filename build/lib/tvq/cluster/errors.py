"""How a process ends: one error, and the exit codes that a supervisor reads."""

EXIT_FAILED = 1  # restart me
EXIT_INPUT = 2  # wrong configuration or input: a restart would fail again
EXIT_DIVERGED = 3  # loss or gradient is no number: runs repeat, and a restart would diverge again
EXIT_STUCK = 70  # the watchdog ended me: restart me
EXIT_STOPPED = 75  # asked to stop, and saved: start me again


class ClusterError(RuntimeError):
    """The processes did not come together, or lost one another. Starting again may succeed."""

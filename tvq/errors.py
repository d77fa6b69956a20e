"""Errors that end the program with a message and no traceback; `__main__` has their exit codes."""


class InputError(ValueError):
    """A config, an option or a file is wrong. The message names it, the numbers, and what would work."""


class SaveError(OSError):
    """A checkpoint cannot be written."""


class DivergedError(RuntimeError):
    """Loss or gradient is no longer a number."""


class DisagreementError(RuntimeError):
    """Two programs that must give the same numbers do not."""

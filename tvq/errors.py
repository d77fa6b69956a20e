"""What a user can put right: the program prints it without a traceback and exits with 2."""


class InputError(ValueError):
    """A config, an option or a file is wrong. The message names it, the numbers, and what would work."""

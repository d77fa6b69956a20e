"""The tvq command with this model instead of ours; several commands are separated by `--`."""

import itertools
import sys

from tests import decay
from tvq import __main__ as command_line
from tvq import model

for name in model.__all__:
    setattr(model, name, getattr(decay, name, None))

if __name__ == "__main__":
    for is_end, command in itertools.groupby(sys.argv[1:], "--".__eq__):
        if not is_end and (code := command_line.main(list(command))):
            sys.exit(code)

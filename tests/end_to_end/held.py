"""The tvq command, held at one point of its run so that a test can stop or kill it right there.

python -m tests.end_to_end.held POINT ARGUMENTS. It prints "held" at POINT: start, before there is a state;
row:STEP, the row of that update is written; save:STEP, all files of that checkpoint are written and it is
not committed.
"""

import signal
import sys
import threading
import time
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from tests.fakes.cached import share_programs
from tvq import __main__
from tvq.programs import branch
from tvq.run import metrics, records


def wait_for_signal() -> None:
    """Returns when SIGTERM, SIGINT or SIGHUP has come and its handler has run."""
    handled = []

    def handle(number: int, frame: Any) -> None:
        handlers[number](number, frame)
        handled.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers: dict[int, Any] = {number: signal.signal(number, handle) for number in numbers}
    print("held", flush=True)
    while not handled:
        time.sleep(0.01)


def hold_at_start(_: str) -> None:
    def hold(*_: Any) -> None:
        print("held", flush=True)
        threading.Event().wait()

    branch.resume = hold  # type: ignore[assignment]


def hold_at_row(step: str) -> None:
    write = records.JsonlWriter.write

    def write_and_hold(self: records.JsonlWriter, row: metrics.Row) -> None:
        write(self, row)
        if row["step"] == int(step) and row["split"] == "train":
            wait_for_signal()

    records.JsonlWriter.write = write_and_hold  # type: ignore[method-assign]


def hold_in_save(step: str) -> None:
    finalize = ocp.StandardCheckpointHandler.finalize

    def finalize_and_hold(self: ocp.StandardCheckpointHandler, directory: epath.Path) -> None:
        finalize(self, directory)
        if directory.parent.name.startswith(f"{step}."):
            print("held", flush=True)
            threading.Event().wait()

    ocp.StandardCheckpointHandler.finalize = finalize_and_hold


if __name__ == "__main__":
    share_programs()
    kind, _, at = sys.argv[1].partition(":")
    {"start": hold_at_start, "row": hold_at_row, "save": hold_in_save}[kind](at)
    sys.exit(__main__.main(sys.argv[2:]))

"""The log that each process writes for itself."""

import functools
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

from tvq.cluster.place import Place


def log_folder(workdir: str) -> Path:
    """`workdir/logs`; for a workdir that is no local folder (gs://...), a folder of this machine's own.

    A log is appended to, line by line, and takes stack dumps after a crash: object stores do neither.
    """
    if "://" not in workdir:
        return Path(workdir) / "logs"
    return Path(tempfile.gettempdir()) / "tvq-logs" / re.sub(r"\W+", "-", workdir)


class Log:
    """`folder/process_N.log`, and the terminal's error stream.

    With one process there is no file until `file` is first asked for, by the watchdog of a run that has
    begun: a start that is refused leaves nothing behind.
    """

    def __init__(self, folder: Path, place: Place):
        self.path = folder / f"process_{place.process_id}.log"
        self.prefix = f"[{place.process_id}] " if place.n_process > 1 else ""
        self._opened = False
        if place.n_process > 1:
            self.say(str(place))

    @functools.cached_property
    def file(self) -> TextIO:
        """Open to append, line by line. OSError: the folder cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._opened = True
        return self.path.open("a", buffering=1)

    def say(self, text: str) -> None:
        """One or more lines, with the time, to the file and the terminal."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in text.splitlines():
            if self._opened or self.prefix:
                self.file.write(f"{stamp} {line}\n")
            print(f"{self.prefix}{line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._opened:
            self.file.close()

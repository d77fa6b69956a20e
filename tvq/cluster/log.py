"""The log that each process writes for itself."""

import re
import sys
import tempfile
import time
from pathlib import Path

from tvq.cluster.place import Place


def log_folder(workdir: str) -> Path:
    """`workdir/logs`; for a workdir that is no local folder (gs://...), a folder of this machine's own.

    A log is appended to, line by line, and takes stack dumps after a crash: object stores do neither.
    """
    if "://" not in workdir:
        return Path(workdir) / "logs"
    return Path(tempfile.gettempdir()) / "tvq-logs" / re.sub(r"\W+", "-", workdir)


class Log:
    """`folder/process_N.log`, and the terminal's error stream; kept open until the process ends."""

    def __init__(self, folder: Path, place: Place):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"process_{place.process_id}.log"
        self.file = self.path.open("a", buffering=1)
        self.prefix = f"[{place.process_id}] " if place.n_process > 1 else ""

    def say(self, text: str) -> None:
        """One or more lines, with the time, to the file and the terminal."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in text.splitlines():
            self.file.write(f"{stamp} {line}\n")
            print(f"{self.prefix}{line}", file=sys.stderr, flush=True)

"""The log file of each process."""

import fcntl
import functools
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

from tvq import words
from tvq.cluster.place import Place
from tvq.errors import ClusterError

CLEAR = "\r\x1b[K"  # goes to the start of the line and clears it


def has_escape_codes(stream: TextIO | words.Words) -> bool:
    """Whether it is a terminal on which a line can be rewritten."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def local_folder(workdir: str) -> Path:
    """The workdir; if that is not a local folder (gs://...), a folder on this machine.

    For files that are appended to and take stack dumps after a crash: object stores allow neither.
    """
    if "://" not in workdir:
        return Path(workdir)
    return Path(tempfile.gettempdir()) / "tvq-logs" / re.sub(r"\W+", "-", workdir)


def log_folder(workdir: str) -> Path:
    """Where the processes of a run write their logs."""
    return local_folder(workdir) / "logs" if "://" not in workdir else local_folder(workdir)


class Log:
    """`folder/process_N.log`, and the terminal's error stream.

    With one process there is no file until `file` is first used, by the watchdog of a run that has
    started: a start that is refused leaves nothing behind.
    """

    def __init__(self, folder: Path, place: Place):
        self.path = folder / f"process_{place.process_id}.log"
        self.prefix = f"[{place.process_id}] " if place.n_process > 1 else ""
        self._opened = False
        if place.n_process > 1:
            self.say(str(place))

    @functools.cached_property
    def file(self) -> words.Words:
        """Open to append. OSError: the folder cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        opened = words.guarded(self.path.open("ab", buffering=0), patience=None)
        self._opened = True
        return opened

    def claim(self) -> None:
        """Keeps other runs out of the workdir until this process ends, however it ends.

        ClusterError: a run is in progress there. OSError: the folder cannot be written. This has no effect on
        a file system without locks.
        """
        file = self.file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ClusterError(
                f"a run is in progress in --workdir: its process holds {self.path} (fuser names it);"
                " stop it first, or use another workdir"
            ) from error
        except OSError:
            return

    def say(self, text: str) -> None:
        """Writes one or more lines, with the time, to the file and the terminal, if they can be written."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        terminal = words.guarded(sys.stderr)
        clear = CLEAR if has_escape_codes(terminal) else ""  # there may be a live line
        for line in text.splitlines():
            if self._opened or self.prefix:
                self.file.write(f"{stamp} {line}\n")
            terminal.write(f"{clear}{self.prefix}{line}\n")

    def close(self) -> None:
        if self._opened:
            self.file.close()

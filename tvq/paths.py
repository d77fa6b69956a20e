"""Where a user's folders are: `~` in paths, and the cache."""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from tvq import words
from tvq.errors import InputError

# The options of all commands that are paths.
OPTIONS = {"config", "document", "from_state", "input", "model", "more", "output", "prompts", "save_state"}
OPTIONS |= {"workdir", "from", "from_weights"}


def expand(option: str, path: str) -> str:
    """The path with `~` and `~user` resolved. InputError if that folder is not known."""
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise InputError(
            f"{option}={path}: the home folder of {path.partition('/')[0]} is not known here (no HOME, or no"
            f" such user); write the path in full, or ./{path} for a folder of that name"
        )
    return expanded


def expand_options(options: dict[str, Any]) -> None:
    """Resolves `~` in the options of a command that are paths: a shell does not in `--workdir=~/run`."""
    for name in OPTIONS & options.keys():
        value = options[name]
        if isinstance(value, list):
            options[name] = [expand(name, path) for path in value]
        elif value:
            options[name] = expand(f"--{name}", value)


def run_and_step(text: str) -> tuple[str, int | None]:
    """`RUN@STEP` as its two parts. None: there is no step, or a folder with this whole name."""
    run, _, step = text.rpartition("@")
    if not run or not (step.isascii() and step.isdecimal()) or epath.Path(text).exists():
        return text, None
    return run, int(step)


def size(path: epath.Path) -> int:
    """The bytes of a file. epath's own `stat` fails on a local file whose owner has no name."""
    return int(path.stat().length) if "://" in str(path) else os.stat(path).st_size


def cache_folder() -> Path:
    """tvq's folder in the user's cache; if there is none, one in the temporary folder, with a message.

    A user without a home, as in `docker run --user`, has no HOME, or one that cannot be written.
    """
    try:
        return _writable(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tvq"))
    except RuntimeError:  # no HOME and no entry in /etc/passwd
        return _writable(None)


@functools.cache  # so that the message is printed once
def _writable(folder: Path | None) -> Path:
    trouble = "there is no HOME"
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
            trouble = f"{folder} cannot be written"
        except OSError as error:
            trouble = f"{folder} cannot be made ({error.strerror})"
    try:
        instead = _temporary()
    except OSError as error:
        raise InputError(f"config.data.cache: {trouble}, nor {error}; set it to a folder of yours") from error
    words.tell(
        f"tvq: {trouble}: the cache is in {instead}; set config.data.cache or XDG_CACHE_HOME to keep it"
    )
    return instead


def _temporary() -> Path:
    """A folder of this user alone, the same at each start: nobody else may put programs there."""
    folder = Path(tempfile.gettempdir(), f"tvq-cache-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:  # a file
        return Path(tempfile.mkdtemp(prefix="tvq-cache-"))
    info = folder.lstat()
    if folder.is_symlink() or info.st_uid != os.getuid() or info.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="tvq-cache-"))
    return folder

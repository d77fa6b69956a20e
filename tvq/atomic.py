"""Files that are written whole or not at all: a reader sees the old content or the new."""

import contextlib
import secrets

from etils import epath


def write(path: epath.Path, content: bytes | str) -> int:
    """Makes `path`, and its folder, with this content (text as UTF-8); returns its bytes.

    OSError: it cannot be written, and nothing has changed.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return len(data)


def check(folder: epath.Path) -> None:
    """Makes the folder if it is missing. OSError: no file can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = _temporary(folder)
    probe.write_bytes(b"")
    probe.unlink()


def _temporary(folder: epath.Path) -> epath.Path:
    """A hidden file, with a name that no user's file has."""
    return folder / f".tvq.{secrets.token_hex(8)}.tmp"

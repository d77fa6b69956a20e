"""Files that are there whole or not at all."""

from pathlib import Path

import pytest
from etils import epath

from tvq import atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = epath.Path(tmp_path) / "folder" / "name"
    assert atomic.write(path, "é") == 2
    assert atomic.write(path, b"new") == 3
    assert path.read_bytes() == b"new"
    assert [x.name for x in path.parent.iterdir()] == ["name"]
    longest = path.with_name("n" * 255)
    atomic.write(longest, "")
    longest.unlink()
    kept = path.with_name("name.tmp")
    kept.write_text("the user's own")
    atomic.write(path, "newer")
    assert kept.read_text() == "the user's own"


@pytest.mark.parametrize("ending", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending) -> None:
    path = epath.Path(tmp_path) / "name"
    path.write_text("old")

    def half(self, data: bytes) -> None:
        with Path(self).open("wb") as file:
            file.write(data[: len(data) // 2])
        raise ending

    monkeypatch.setattr(type(path), "write_bytes", half)
    with pytest.raises(type(ending)):
        atomic.write(path, "new and longer")
    assert [x.name for x in path.parent.iterdir()] == ["name"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("folder", ["/proc", "/dev/null/x"])
def test_a_folder_that_cannot_be_written(folder: str) -> None:
    with pytest.raises(OSError, match=r"Not a directory|No such file|denied|not permitted"):
        atomic.check(epath.Path(folder))

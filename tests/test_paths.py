import os
import pwd
from pathlib import Path

import pytest
from etils import epath

from tvq import paths
from tvq.errors import InputError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path


def test_every_option_that_is_a_path(home: Path) -> None:
    options = {
        "workdir": "~/run", "more": ["~/a", "b"], "output": "", "prompts": None, "prompt": "~",
        "input": "a/~",
    }  # fmt: skip
    paths.expand_options(options)
    assert options == {
        "workdir": f"{home}/run", "more": [f"{home}/a", "b"], "output": "", "prompts": None, "prompt": "~",
        "input": "a/~",
    }  # fmt: skip


def test_a_home_that_nobody_knows_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match=r"--workdir=~nosuchuser/run: the home folder of ~nosuchuser"):
        paths.expand("--workdir", "~nosuchuser/run")


def test_the_cache_of_a_user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.cache_folder() == home / ".cache" / "tvq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "other"))
    assert paths.cache_folder() == home / "other" / "tvq"


@pytest.mark.parametrize("kind", ["no HOME and no such user", "a HOME that is no folder"])
def test_the_cache_of_a_user_without_a_home(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """As with docker run --user."""
    if kind.startswith("no"):

        def nobody(number: int) -> None:
            raise KeyError(f"uid not found: {number}")

        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", nobody)
        paths._writable.cache_clear()
    else:
        (home / "file").touch()
        monkeypatch.setenv("HOME", str(home / "file"))
    folder = paths.cache_folder()
    assert folder == paths.cache_folder() == home / "temporary" / f"tvq-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err.count(f"the cache is in {folder}") == 1


def test_the_size_of_a_file_whose_owner_has_no_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> None:
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    (home / "file").write_text("four")
    with pytest.raises(KeyError):
        epath.Path(home / "file").stat()
    assert paths.size(epath.Path(home / "file")) == 4


def test_a_cache_that_others_may_write_is_not_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = home / "temporary" / f"tvq-cache-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    assert paths._temporary() != planted

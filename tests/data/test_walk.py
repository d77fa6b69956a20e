"""The one walk: what it reads from a folder that holds all kinds of things."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from etils import epath

from tvq import config
from tvq.data import files, splits, texts, walk


def put(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def names(root: Path) -> list[str]:
    return [file.name for file in walk.walk(epath.Path(root)).files]


def test_regular_files_in_natural_order(tmp_path, monkeypatch):
    put(tmp_path, ["b.txt", "a/z.txt", "a.txt", ".hidden", ".git/x", "a/.y", "deep/er/c", "n10", "n9", "n09"])
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        wanted = ["a.txt", "a/z.txt", "b.txt", "deep/er/c", "n09", "n9", "n10"]
        assert names(tmp_path) == wanted
        # Hashing neither waits for the pipe.
        assert files.hashes(walk.walk(epath.Path(tmp_path)).files, 2)[1] == sum(map(len, wanted))


@pytest.mark.parametrize("name", ["²", "x²10", "١٢", "-rf", "a b", "a\nb", "a\rb", "a\\b", "\udcff.txt", "ü"])
def test_strange_names(tmp_path, name):
    put(tmp_path / "in", [name, "a.txt"])
    found = walk.walk(epath.Path(tmp_path / "in")).files
    assert {file.name for file in found} == {name, "a.txt"}
    assert splits.hashed_split(name) in splits.SPLITS
    lines, n_byte = files.hashes(found, 1)
    assert n_byte == len(os.fsencode(name)) + 5
    (tmp_path / "sums").write_bytes(lines)
    checked = subprocess.run(["sha256sum", "-c", "--quiet", "../sums"], cwd=tmp_path / "in", check=False)
    assert checked.returncode == 0
    assert files.shown(name).isprintable()


def test_links(tmp_path):
    put(tmp_path, ["in/a/1", "in/b/2", "elsewhere/3"])
    for link, target in (
        ("in/a/up", ".."),
        ("in/a/b", "../b"),
        ("in/b/a", "../a"),
        ("in/out", "../elsewhere"),
    ):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "in" / "file").symlink_to("a/1")
    assert names(tmp_path / "in") == ["a/1", "b/2", "file", "out/3"]


@pytest.mark.parametrize("target", ["gone", "itself"])
def test_a_link_that_leads_nowhere(tmp_path, target):
    put(tmp_path, ["a.txt"])
    (tmp_path / "itself").symlink_to(target)
    with pytest.raises(ValueError, match=r"cannot read .*itself \((No such file|Too many levels)"):
        walk.walk(epath.Path(tmp_path))


@pytest.mark.parametrize("content", [[], [".hidden"]])
def test_an_empty_folder(tmp_path, content):
    put(tmp_path, content)
    with pytest.raises(ValueError, match="holds no text or images"):
        walk.walk(epath.Path(tmp_path))


def test_what_can_be_read_only_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader, writer = os.pipe()
    for path in (tmp_path / "pipe", Path(f"/dev/fd/{reader}")):
        with pytest.raises(
            ValueError, match="is neither a file nor a folder, it can be read only once; write"
        ):
            walk.walk(epath.Path(path))
        with pytest.raises(ValueError, match="it can be read only once"):
            texts.text(epath.Path(path), "text", 0)
    with pytest.raises(ValueError, match="null is neither a file nor a folder; write"):
        walk.one(epath.Path("/dev/null"))
    os.close(reader)
    os.close(writer)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"cannot read .* \(Permission denied\); make it readable"):
        walk.walk(epath.Path(tmp_path))


def test_stdlib_leaves_out_installed_packages(tmp_path, monkeypatch):
    put(tmp_path, ["os.py", "json/decoder.py", "LICENSE.txt", "a.pyc", "__pycache__/os.py"])
    put(tmp_path, ["site-packages/numpy/a.py", "dist-packages/b.py"])
    monkeypatch.setattr(texts.sysconfig, "get_path", {"stdlib": tmp_path}.get)
    assert [file.name for file in texts.stdlib().files] == ["json/decoder.py", "os.py"]


def test_the_root_itself_may_be_of_tvq(tmp_path):
    put(tmp_path, ["config.json", "metrics.jsonl", "samples/1.txt"])
    assert len(names(tmp_path)) == 3
    assert config.FILE == "config.json", "known to walk.is_own"


def test_what_is_left_out_may_be_the_root(tmp_path):
    put(tmp_path, ["a.txt", "cache/b.txt"])
    left = lambda folder: [f.name for f in walk.walk(epath.Path(tmp_path), leave_out=[folder]).files]
    assert left(tmp_path) == ["a.txt", "cache/b.txt"]
    assert left(tmp_path / "cache") == ["a.txt"]


def test_a_bucket_is_walked_by_the_same_rules(tmp_path, monkeypatch):
    put(
        tmp_path,
        ["n10", "n9", ".hidden", "a/b.txt", "run/config.json", "run/metrics.jsonl", "run/samples/1.txt"],
    )
    monkeypatch.setattr(walk, "is_bucket", lambda path: True)
    found = walk.walk(epath.Path(tmp_path))
    assert [file.name for file in found.files] == ["a/b.txt", "n9", "n10"]
    assert found.left_out == ["run/"]

import os
from pathlib import Path

import pytest

from tvq import config
from tvq.data import documents


def text(path: Path) -> config.Data:
    return config.Data(source="text", path=str(path))


def put(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_the_split_of_a_name_never_changes():
    # Recorded: another hash would move text from training to test.
    names = ["os.py", "json/decoder.py", "a4.txt", "a122.txt", "a14.txt", "a189.txt"]
    wanted = ["train", "train", "validation", "validation", "test", "test"]
    assert [documents.hashed_split(name) for name in names] == wanted


def test_split_shares():
    splits = [documents.hashed_split(f"{i}.txt") for i in range(20_000)]
    assert splits.count("train") / 20_000 == pytest.approx(0.98, abs=0.004)
    assert splits.count("validation") / 20_000 == pytest.approx(0.01, abs=0.003)
    assert splits.count("test") / 20_000 == pytest.approx(0.01, abs=0.003)


def test_folder_sorted_and_without_hidden(tmp_path):
    put(tmp_path, ["b.txt", "a/z.txt", "a.txt", ".hidden", ".git/x", "a/.y", "deep/er/c"])
    os.mkfifo(tmp_path / "pipe")
    found = documents.find(text(tmp_path))
    assert [document.name for document in found] == ["a.txt", "a/z.txt", "b.txt", "deep/er/c"]
    assert all(b"".join(d.chunks()) == d.name.encode() for d in found)
    assert all(d.split == documents.hashed_split(d.name) for d in found)


@pytest.mark.parametrize("size", [2, 10, 20, 1001])
def test_one_file_is_cut_in_order(tmp_path, size):
    content = os.urandom(size)
    path = tmp_path / "text"
    path.write_bytes(content)
    found = documents.find(text(path))
    assert b"".join(chunk for d in found for chunk in d.chunks()) == content
    assert found[0].split == "train"
    assert found[0].stop == size * 90 // 100
    assert all(d.start < d.stop for d in found)
    if size >= 20:
        assert [d.split for d in found] == ["train", "validation", "test"]
        assert found[1].stop == size * 95 // 100


def test_chunks_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 7)
    path = tmp_path / "text"
    path.write_bytes(os.urandom(100))
    train = documents.find(text(path))[0]
    sizes = [len(chunk) for chunk in train.chunks()]
    assert max(sizes) == 7
    assert sum(sizes) == 90


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, ["text"])
    assert documents.find(config.Data(source="text", path="~/text"))


def test_missing(tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.path: .*gone cannot be opened \(No such file.*give"):
        documents.find(text(tmp_path / "gone"))


def test_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"config\.data\.path: .*pipe is neither a file nor a folder; give"):
        documents.find(text(tmp_path / "pipe"))


@pytest.mark.parametrize("names", [[], [".hidden"]])
def test_empty_folder(tmp_path, names):
    put(tmp_path, names)
    with pytest.raises(ValueError, match=r"config\.data\.path: .* holds no text \(0 bytes in 0 files.*give"):
        documents.find(text(tmp_path))


def test_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"config\.data\.path: .*empty holds no text .*give"):
        documents.find(text(tmp_path / "empty"))


def test_nothing_to_train_on(tmp_path):
    put(tmp_path, ["a4.txt"])
    (tmp_path / "a.txt").touch()
    wanted = r"config\.data\.path: the 2 files of .* hold no training text \(bytes: train 0,.* add files"
    with pytest.raises(ValueError, match=wanted):
        documents.find(text(tmp_path))


def test_dangling_link(tmp_path):
    put(tmp_path, ["a.txt"])
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"config\.data\.path: cannot read .*b\.txt \(No such file.*; make"):
        documents.find(text(tmp_path))


def test_unreadable_file(tmp_path, monkeypatch):
    put(tmp_path, ["a.txt"])
    (document,) = documents.find(text(tmp_path))

    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(
        ValueError, match=r"config\.data\.path: cannot read .*a\.txt \(Permission denied\); make"
    ):
        list(document.chunks())


def test_unreadable_folder(tmp_path, monkeypatch):
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"config\.data\.path: cannot read .* \(Permission denied\); make"):
        documents.find(text(tmp_path))


def test_file_shrinks_while_read(tmp_path):
    put(tmp_path, ["a.txt"])
    (document,) = documents.find(text(tmp_path))
    document.path.write_bytes(b"a")
    with pytest.raises(ValueError, match=r"a\.txt became shorter"):
        list(document.chunks())


def test_stdlib_leaves_out_installed_packages(tmp_path, monkeypatch):
    put(tmp_path, ["os.py", "json/decoder.py", "LICENSE.txt", "a.pyc", "__pycache__/os.py"])
    put(tmp_path, ["site-packages/numpy/a.py", "dist-packages/b.py"])
    monkeypatch.setattr(documents.sysconfig, "get_path", {"stdlib": tmp_path}.get)
    assert [d.name for d in documents.find(config.Data())] == ["json/decoder.py", "os.py"]

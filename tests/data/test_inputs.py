"""Inputs as people have them: compressed in other ways, in other encodings, damaged, or something else."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from etils import epath
from PIL import Image

from tests.data.raw import picture
from tvq.data import files, images, prepared, texts
from tvq.data.files import File, Meter
from tvq.data.splits import SPLITS, Piece
from tvq.data.vocabulary import SentencePieceVocabulary, train_sentencepiece
from tvq.programs import prepare

IN = Path(__file__).parent / "in"
ROWS = b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(9))
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE),
    ".zst": zstandard.compress,
}


def zipped(names: dict[str, bytes]) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        for name, content in names.items():
            file.writestr(name, content)
    return whole.getvalue()


def tarred() -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    return whole.getvalue()


def documents_of(path: Path, column: str = "text", **options: object) -> list[tuple[str, bytes]]:
    """The split and the text of each document."""
    found, now = [], b""
    for piece in texts.text(epath.Path(path), column, 0, **options).pieces(Meter()):
        now += piece.raw
        if piece.last:
            found.append((piece.split, now))
            now = b""
    return found


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("upper", [False, True])
def test_packed_text_is_unpacked(tmp_path, suffix, upper):
    text = (IN / "numbers.txt").read_bytes()
    for stem in ("numbers.txt", "numbers"):
        path = tmp_path / f"{stem}{suffix.upper() if upper else suffix}"
        path.write_bytes(PACK[suffix](text))
        assert b"".join(text for _, text in documents_of(path)) == text
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"is damaged or incomplete|cannot read"):
            documents_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_text_is_known_by_its_first_bytes_too(tmp_path, suffix):
    (tmp_path / "numbers.txt").write_bytes(PACK[suffix]((IN / "numbers.txt").read_bytes()))
    assert sum(len(text) for _, text in documents_of(tmp_path / "numbers.txt")) == 2000


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.jsonl.bz2", "a.ndjson.XZ"]
)
def test_rows(tmp_path, name):
    pack = PACK.get(Path(name.lower()).suffix, lambda raw: raw)
    (tmp_path / name).write_bytes(pack(ROWS))
    assert [text for _, text in documents_of(tmp_path / name)] == [b"row %d" % i for i in range(9)]


def test_a_zip_of_rows(tmp_path):
    (tmp_path / "a.jsonl.zip").write_bytes(zipped({"a.jsonl": ROWS, "__MACOSX/._a.jsonl": b"x", "b/": b""}))
    assert len(documents_of(tmp_path / "a.jsonl.zip")) == 9
    (tmp_path / "b.zip").write_bytes(zipped({"a.jsonl": ROWS}))
    with pytest.raises(ValueError, match=r"b\.zip holds the table a\.jsonl; unpack it, or let its name end"):
        documents_of(tmp_path / "b.zip")


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.tar.gz", gzip.compress(tarred()), "what .* holds is a tar archive; unpack it"),
        ("a.tgz", gzip.compress(tarred()), "what .* holds is a tar archive; unpack it"),
        ("a.tar", tarred(), "is a tar archive, which is not read as text; unpack it"),
        (
            "a.txt.gz.gz",
            gzip.compress(gzip.compress(b"x" * 99)),
            "what .* holds is compressed with gz; unpack it",
        ),
        ("a.txt", b"7z\xbc\xaf\x27\x1c" + bytes(99), "is a 7z archive, which is not read"),
        ("a", b"Rar!\x1a\x07\x01\x00" + bytes(99), "is a RAR archive"),
        ("a.lz4", b"\x04\x22\x4d\x18" + bytes(99), "is compressed with lz4"),
        ("a.txt.br", b"some text that is none", "is compressed with Brotli"),
        ("a.docx", zipped({"a": b"x", "b": b"x"}), "holds 2 files, not one; unpack it"),
        ("a.txt", b"PAR1\x15" + bytes(99), "is a Parquet table"),
        ("a.gz", b"no such format", "is damaged or incomplete"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",  # compressed data contains the time
)
def test_what_is_no_text_is_refused(tmp_path, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=wanted):
        documents_of(tmp_path / name)


@pytest.mark.parametrize("name", ["deflate64.zip", "encrypted.zip", "lzma-damaged.zip"])
def test_whatever_a_library_raises_names_the_file(name):
    with pytest.raises(ValueError, match=rf"{name} .*(not supported|encrypted|Corrupt).*") as error:
        documents_of(IN / name)
    assert "\n" not in str(error.value)


def test_a_long_window_of_zstd():
    assert len(documents_of(IN / "long31.jsonl.zst")) == 300


def test_a_file_that_grows_while_it_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    with pytest.raises(ValueError, match="changed while it was read, from 5 bytes to 4; try again"):
        list(files.chunks(File(epath.Path(tmp_path / "a"), "a", 5), Meter()))


@pytest.mark.parametrize(("content", "n_byte"), [(b"", 0), (b"x", 1)])
def test_next_to_nothing(tmp_path, content, n_byte):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=rf"\(?{n_byte} bytes"):
        documents_of(tmp_path / "a")


DEEP = b'{"text": ' + b"[" * 100_000


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ((IN / "blank-and-null.jsonl").read_bytes(), r"line 3 of .* has no text in 'text', but null"),
        (b'{"text": 3}', "line 1 of .* but a value of type int"),
        (b'{"text": ["a"]}', "line 1 of .* but a value of type list"),
        (b"\r\n[1]\r\n", "line 2 of .*: it is of type list, not an object"),
        (DEEP, "line 1 of .* has no text in 'text' .*recursion"),
        (b'{"text": "a"}\0', "line 1 of .* has no text in 'text'"),
        (b'{"text": "\xff"}', "line 1 of .* has no text in 'text'"),
        (b'{"text": "a', "line 1 of .* has no text in 'text'"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path, rows, wanted):
    (tmp_path / "a.jsonl").write_bytes(rows)
    with pytest.raises(ValueError, match=wanted):
        documents_of(tmp_path / "a.jsonl")


def test_rows_between_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \n{"text": ""}\n{"text": "b"}\n\n')
    assert [text for _, text in documents_of(tmp_path / "a.jsonl")] == [b"a", b"", b"b"]


def test_long_rows_and_text_without_spaces_take_linear_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 1 << 10)
    size = 1 << 25  # 32,768 chunks: joining each to all before would copy 500 GB
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * size + b'"}')
    began = time.monotonic()
    ((_, text),) = documents_of(tmp_path / "a.jsonl")
    assert len(text) == size
    parts = [Piece("train", "a", b"x" * (1 << 10), last=i == size // 1024 - 1) for i in range(size // 1024)]
    assert sum(len(piece.raw) for piece in texts.at_spaces(parts)) == size
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("n_train", [0, *range(6001, 6005)])
def test_a_cut_within_a_letter(n_train):
    text = (IN / "cyrillic.txt").read_bytes()
    found = texts.text(epath.Path(IN / "cyrillic.txt"), "text", n_train, whole_letters=True)
    parts = {split: b"".join(p.raw for p in found.pieces(Meter()) if p.split == split) for split in SPLITS}
    assert b"".join(parts.values()) == text
    for split, part in parts.items():
        part.decode()
        assert abs(len(part) - {"train": n_train or 12238}.get(split, len(part))) <= 3


@pytest.mark.parametrize("letter", ["a", "é", "字", "😀"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_letters_stay_whole_whatever_the_chunks(tmp_path, monkeypatch, letter, size):
    (tmp_path / "a").write_text(letter * 23)
    monkeypatch.setattr(files, "CHUNK", size)
    cut = documents_of(tmp_path / "a", whole_letters=True)
    assert "".join(text.decode() for _, text in cut) == letter * 23
    assert [split for split, _ in cut] == list(SPLITS)


def test_utf16_is_told(tmp_path):
    (tmp_path / "a").write_bytes("text".encode("utf-16") * 99)
    with pytest.raises(ValueError, match=r"a is not UTF-8 \(it begins as UTF-16 does\): "):
        list(texts.sentences(texts.text(epath.Path(tmp_path / "a"), "text", 0).pieces(Meter()), 999))


def test_text_that_is_not_utf8_is_still_told(tmp_path):
    (tmp_path / "a").write_bytes(b"\x80" * 1000)
    with pytest.raises(ValueError, match="is not UTF-8"):
        list(texts.sentences(texts.text(epath.Path(tmp_path / "a"), "text", 0).pieces(Meter()), 999))


@pytest.fixture(scope="module")
def english() -> SentencePieceVocabulary:
    return train_sentencepiece(iter(["the quick brown fox jumps over a lazy dog " * 9]), 40)


def test_unknown_pieces_are_counted_and_told(tmp_path, english, capsys):
    (tmp_path / "model").write_bytes(english.model)
    options = {"kind": "text", "input": str(IN / "cyrillic.txt"), "model": str(tmp_path / "model")}
    prepare.prepare(prepare.Options(**options, output=str(tmp_path / "out")))
    manifest = prepared.read(epath.Path(tmp_path / "out"), "", "")
    info = manifest.splits["validation"]
    ids = np.fromfile(tmp_path / "out" / "validation.tokens", "<u2")
    assert info.n_unknown == np.count_nonzero(ids == 2) > info.n_token // 4
    assert "%, are the unknown piece" in prepared.unknown(info)
    assert "UNKNOWN" in capsys.readouterr().out


def test_few_unknown_pieces_are_not_told():
    few = {"n_document": 1, "n_byte": 9, "n_word": 1, "sha256": "", "gzip_bytes": None}
    assert not prepared.unknown(prepared.Split(n_token=10_000, n_unknown=9, **few))
    assert prepared.unknown(prepared.Split(n_token=10_000, n_unknown=10, **few))
    assert not prepared.unknown(prepared.Split(n_token=10_000, **few))


def rgb(path: Path | bytes, size: int = 64, fit: bool = True) -> np.ndarray:
    raw = path if isinstance(path, bytes) else path.read_bytes()
    pixels = images.pixels(Piece("test", "image", raw, last=True), size, fit=fit)
    return np.frombuffer(pixels, np.uint8).reshape(size, size, 3)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    whole = io.BytesIO()
    image.save(whole, kind, **options)
    return whole.getvalue()


def test_sixteen_bits():
    ramp = np.asarray(Image.open(IN / "gray16-ramp.png")).astype(float)
    np.testing.assert_array_equal(rgb(IN / "gray16-ramp.png")[..., 0], np.round(ramp / 257))
    values = np.array([[0, 257], [32896, 65535]], np.uint16)
    for kind in ("TIFF", "PNG", "PPM"):
        found = rgb(encoded(Image.fromarray(values), kind), 2)
        assert found[..., 1].tolist() == [[0, 1], [128, 255]], kind
    with pytest.raises(ValueError, match="32 bits a value without a known range"):
        rgb(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), 2)


def test_orientation():
    plain = np.asarray(Image.open(IN / "exif-orientation3.jpg").convert("RGB"))
    size = min(plain.shape[:2])
    assert plain.shape == (size, size, 3)
    np.testing.assert_array_equal(rgb(IN / "exif-orientation3.jpg", size), plain[::-1, ::-1])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = rgb(encoded(Image.fromarray(picture(0)), exif=exif), fit=False)
    np.testing.assert_array_equal(turned, np.rot90(picture(0), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_clear_is_white(mode):
    colour = Image.new("RGBA", (4, 4), (90, 90, 90, 255))
    colour.paste((10, 10, 10, 0), (0, 0, 2, 4))
    options = {}
    if mode in ("RGBA", "LA"):
        image = colour.convert(mode)
    elif mode == "P":
        image = colour.convert("RGB").quantize(2)
        options["transparency"] = image.getpixel((0, 0))
    else:
        image = colour.convert(mode)
        options["transparency"] = 10 if mode == "L" else (10, 10, 10)
    found = rgb(encoded(image, **options), 4)
    assert (found[:, :2] == 255).all()
    assert (found[:, 2:] == 90).all()


def test_a_hidden_colour():
    image = np.asarray(Image.open(IN / "alpha-hidden-colour.png").convert("RGBA"))
    size = len(image)
    assert (rgb(IN / "alpha-hidden-colour.png", size)[image[..., 3] == 0] == 255).all()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("CMYK", "JPEG"), ("1", "PNG"), ("P", "GIF"), ("L", "BMP"), ("YCbCr", "TIFF"), ("RGB", "WEBP")],
)
def test_other_modes(mode, kind):
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    assert (rgb(encoded(white, kind), 8) > 250).all()


def test_of_an_animation_the_first_picture():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = rgb(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 8)
    assert found[0, 0].tolist() == [255, 0, 0]


def test_all_that_pillow_reads_is_an_image_and_the_rest_is_told(tmp_path):
    for name, kind in (
        ("a.tif", "TIFF"),
        ("b.JPG", "JPEG"),
        ("c.jfif", "JPEG"),
        ("d.ppm", "PPM"),
        ("e.tga", "TGA"),
    ):
        (tmp_path / name).write_bytes(encoded(Image.fromarray(picture(0)), kind))
    (tmp_path / "notes.txt").touch()
    found = images.Images(epath.Path(tmp_path))
    assert [file.name for file in found.files] == ["a.tif", "b.JPG", "c.jfif", "d.ppm", "e.tga"]
    assert found.left_out == [("notes.txt", images.NO_IMAGE)]
    assert len(list(found.pieces(Meter()))) == 5


def test_a_published_split_of_images(tmp_path):
    for name in ("train/1.png", "test/1.png", "cover.png", "values/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(Image.fromarray(picture(0))))
    found = images.Images(epath.Path(tmp_path))
    assert {piece.document: piece.split for piece in found.pieces(Meter())} == {
        "train/1.png": "train",
        "test/1.png": "test",
    }
    assert ("cover.png", "whose name tells no split") in found.left_out


@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps(3), b"\x89PNG\r\n\x1a\n" + bytes(99)])
def test_an_image_that_is_damaged_is_named(content):
    with pytest.raises(ValueError, match=r"^image cannot be read as an image"):
        rgb(content)


def test_a_hub_keeps_its_split(tmp_path, capsys):
    prepare.prepare(prepare.Options(kind="text", input=str(IN / "hub"), output=str(tmp_path / "out")))
    assert "left out   1 whose name tells no split: README.md" in capsys.readouterr().out
    raw = (tmp_path / "out" / "train.tokens").read_bytes()
    text = bytes((np.frombuffer(raw, "<u2") - 3).clip(0, 255).astype(np.uint8)).decode(errors="replace")
    rows = (IN / "hub" / "data" / "train-00000-of-00001.jsonl").read_text().splitlines()
    assert all(json.loads(row)["text"] in text for row in rows)
    assert (tmp_path / "out" / "sources.sha256").read_text().count("\n") == 3


def test_splits_that_end_up_empty_are_told(tmp_path, capsys):
    prepare.prepare(prepare.Options(kind="text", input=str(IN / "empty-split"), output=str(tmp_path / "out")))
    out = capsys.readouterr().out
    assert "validation 1 tokens of 0 bytes in 1 documents; it is EMPTY, and cannot be evaluated" in out
    assert out.count("EMPTY") == 1
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"--input: the 1 documents hold no training text"):
        prepare.prepare(
            prepare.Options(kind="text", input=str(tmp_path / "in"), output=str(tmp_path / "other"))
        )
    assert not (tmp_path / "other").exists()

"""What is asked of a model, and the text of its answer while it is drawn."""

import dataclasses
import io
import json
import os
import sys

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.data import books
from tests.model import small
from tvq import atomic, cluster, rules, schema, sharding
from tvq.data import detokenize
from tvq.data.vocabulary import END, ByteVocabulary
from tvq.errors import InputError
from tvq.model import parameters
from tvq.programs import sample
from tvq.run import draw, image_samples
from tvq.training import optimizer, state

BYTES = ByteVocabulary()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("text", ["aé漢😀z".encode(), b"a\xff\xf0\x9f\x98b\xe6", "é".encode()[:1], b""])
def test_pieces_of_text_hold_whole_characters(text, n):
    ids = BYTES.encode(b"say: " + text)
    drawn = [ids[i : i + n] for i in range(5, len(ids), n)] + [np.array([END])]
    pieces = list(detokenize.stream(BYTES, [ids[:5], *drawn]))
    want = (b"say: " + text).decode(errors="replace")
    assert "".join(pieces) == want
    # No text is taken back: invalid bytes appear only once that is certain.
    if "\ufffd" not in want:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("image_size", [0, 6])
def test_a_sample_of_a_run(image_size):
    """With parameters on the whole mesh, and sharded over it: what one device draws."""
    model = dataclasses.replace(small.MODEL, n_vocab=259)
    c = schema.Config(model=model, sample=schema.Sample(prompt="a" * 9, n_sample=2, length=8))
    weights = small.parameters(model)
    devices, said = sharding.make(schema.Mesh(devices=1, tensor=2), jax.devices()[:2]), []
    draw_sample = sample.sampler(c, BYTES, image_size, devices)
    found = []
    for axes in (sharding.UNCUT, sharding.axes(devices, model, False)):
        specs = parameters.specs(model, axes)
        shardings = jax.tree.map(lambda spec: sharding.sharding(devices, spec), specs)
        placed = jax.device_put(weights, shardings)
        found.append(draw_sample(placed, said.append))
    assert not placed.params["units"]["v"].is_fully_replicated
    assert found[0] == found[1]
    assert any(line.startswith("drawing: ") for line in said)
    if image_size:
        with Image.open(io.BytesIO(found[0])) as sheet:
            assert sheet.size == (2 * image_size + image_samples.GAP, image_size)
    else:
        asked = ["a" * 9]
        alone, streamed = (
            [
                "".join(pieces)
                for pieces in sample.texts(
                    weights, BYTES, c, draw.empty(model), asked, said.append, stream=stream
                )
            ]
            for stream in (False, True)
        )
        assert alone == streamed
        assert found[0] == "".join(sample.shown(alone, 2))
        assert alone[0] != alone[1]


def test_a_sample_of_a_run_stops_where_the_text_ends(monkeypatch):
    """Unless sample.past_end; an image has no ends."""
    asked = []
    monkeypatch.setattr(
        draw, "answers", lambda *a, **options: asked.append(options["end"]) or [np.ones(108, int)]
    )
    model = dataclasses.replace(small.MODEL, n_vocab=259)
    for image_size, past_end in ((0, False), (0, True), (6, False)):
        c = schema.Config(model=model, sample=schema.Sample(past_end=past_end))
        mesh = sharding.make(schema.Mesh(), jax.devices()[:1])
        sample.sampler(c, BYTES, image_size, mesh)({}, print)
    assert asked == [END, None, None]


def test_texts_end_before_a_stop_string(monkeypatch):
    """The same side by side and streamed; the prompt may hold one, and less is drawn."""
    model = dataclasses.replace(small.MODEL, n_vocab=259)
    weights, before, prompts = small.parameters(model), draw.empty(model), ["abc", "b"]
    c = schema.Config(model=model, sample=schema.Sample(n_sample=2, length=100, nucleus=1.0, past_end=True))
    read = lambda c, **how: [
        "".join(pieces) for pieces in sample.texts(weights, BYTES, c, before, prompts, print, **how)
    ]
    on = read(c)
    begun = [prompt for prompt in prompts for _ in range(2)]
    stop = on[0][30]  # a character of the first
    stops = [stop, "b" + on[3][1]]
    monkeypatch.setattr(draw, "CHUNK", 4)
    c = dataclasses.replace(c, sample=dataclasses.replace(c.sample, stop=json.dumps(stops)))
    got = read(c)
    want = [
        text[: min([i for s in stops if (i := text.find(s, len(first))) >= 0], default=None)]
        for text, first in zip(on, begun, strict=True)
    ]
    assert got == want != on
    assert got[3].startswith(begun[3])
    assert read(c, stream=True) == got


@pytest.mark.parametrize("stop", ['["a"', "[1]", '[""]', "[]x", "{}["])
def test_stop_strings(stop):
    if stop == "{}[":
        assert rules.stop_strings(stop) == [stop]
        assert rules.stop_strings('["a\\n", "["]') == ["a\n", "["]
        assert rules.stop_strings("") == []
        return
    with pytest.raises(InputError, match=r"config.sample.stop must be a text, or a JSON list .* in a list: "):
        rules.stop_strings(stop)


def placed(c):
    mesh = sharding.make(c.mesh, jax.devices()[:2])
    return state.place(c, optimizer.make(c.optimizer, c.model), mesh)


def test_samples_of_images_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    c = schema.Config(model=small.MODEL)
    sample.check(c, 0, placed(c))
    sample.check(dataclasses.replace(c, sample=schema.Sample(every=0)), 6, placed(c))
    with pytest.raises(ValueError, match=r"pip install 'tvq\[data\]'"):
        sample.check(c, 6, placed(c))


def test_a_model_that_only_fits_in_parts_is_not_drawn_from(monkeypatch):
    model = dataclasses.replace(small.MODEL, d_model=512)
    c = schema.Config(model=model, mesh=schema.Mesh(shard_params=True))
    of = placed(c)
    monkeypatch.setattr(sharding, "device_memory", lambda name: {"bytes_limit": 2**20}[name])
    sample.check(dataclasses.replace(c, sample=schema.Sample(every=0)), 0, of)
    message = "whole model on each device: its .* use config.sample.every=0, and tvq sample where"
    with pytest.raises(ValueError, match=message):
        sample.check(c, 0, of)
    monkeypatch.setattr(sharding, "device_memory", lambda name: 80 * 2**20)
    sample.check(c, 0, of)
    c = dataclasses.replace(c, mesh=schema.Mesh())
    monkeypatch.setattr(sharding, "device_memory", lambda name: 1)
    sample.check(c, 0, placed(c))  # it is whole there already


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", "one\n\ntwo \u2028 still", ["one", "", "two \u2028 still"]),
        ("a.jsonl", '{"prompt": "one\\ntwo"}\n{"prompt": "", "more": 1}\n', ["one\ntwo", ""]),
    ],
)
def test_prompts_of_a_file(tmp_path, name, content, found):
    path = epath.Path(tmp_path) / name
    path.write_text(content)
    assert sample.read_prompts(path) == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "cannot read it"),
        ("a.txt", b"", "is empty; write one prompt a line"),
        ("a.txt", b"\xff", "is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1 must be"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"text": "b"}\n',
            'line 2 must be {"prompt": "..."}, not {"text": "b"}',
        ),
        ("a.jsonl", b"[", 'line 1 must be {"prompt": "..."}'),
    ],
)
def test_what_is_no_file_of_prompts(tmp_path, name, content, message):
    path = epath.Path(tmp_path) / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="--prompts=") as error:
        sample.read_prompts(path)
    assert message in str(error.value)


LOG = cluster.Log(epath.Path("/dev/null"), cluster.Place(how="a test"))


@pytest.mark.parametrize("name", ["0001.txt", "12345.png", "sheet.png"])
def test_results_are_not_mixed_with_older_ones(tmp_path, name):
    folder = epath.Path(tmp_path)
    (folder / "notes.txt").touch()
    sample.check_output(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / name).touch()
    with pytest.raises(ValueError, match=rf"--output=.* holds results already \({name}\); use another"):
        sample.check_output(folder)
    assert sample.unused(folder / "new").name == "new"
    (folder / "new").mkdir()
    (folder / "new_2").mkdir()
    assert sample.unused(folder / "new").name == "new_3"


@pytest.mark.parametrize("folder", ["/proc", "/dev/null/x"])
def test_where_nothing_can_be_written(folder):
    with pytest.raises(ValueError, match=f"--output={folder}: cannot write there"):
        sample.check_output(epath.Path(folder))
    with pytest.raises(ValueError, match=f"--save_state={folder}: cannot write there"):
        sample.check_save_state(epath.Path(folder) / "x", {})


def test_a_state_overwrites_nothing_but_a_state(tmp_path):
    """Whatever name the document, or another file, is given."""
    document, link, hard, state = (epath.Path(tmp_path) / name for name in ("a.txt", "link", "hard", "state"))
    document.write_text("a text")
    os.symlink(document, link)
    os.link(document, hard)
    (document.parent / "folder").mkdir()
    draw.save(state, draw.empty(small.MODEL), small.MODEL, "")
    for path in (document, link, hard, document.parent / "folder" / ".." / "a.txt"):
        for option in ("--document", "--prompts"):
            with pytest.raises(
                ValueError, match=rf"--save_state=.* is the file of {option} too; use another"
            ):
                sample.check_save_state(path, {option: str(document)})
        with pytest.raises(ValueError, match=r"already exists and is not a saved state"):
            sample.check_save_state(path, {"--document": None})
    for path in ("/dev/null", tmp_path, document.parent / "folder"):
        with pytest.raises(ValueError, match=r"already exists and is not a saved state"):
            sample.check_save_state(epath.Path(path), {})
    with pytest.raises(ValueError, match=r"is the file of --from_state too"):
        sample.check_save_state(state, {"--from_state": str(state)})
    sample.check_save_state(state, {"--document": str(document)})
    sample.check_save_state(document.with_name("new"), {"--document": str(document)})
    assert document.read_text() == "a text"


def test_a_reader_that_has_gone_wants_no_more(monkeypatch, capsys):
    """No traceback, nothing more is drawn, and what is buffered does not fail once more at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    drawn = (str(i) for i in range(9))
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert sample.deliver(drawn, LOG) == 0
        monkeypatch.undo()
    assert next(drawn) == "1"
    assert capsys.readouterr().err == ""


def test_a_full_disk_behind_standard_output_is_said(monkeypatch, capsys):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert sample.deliver(["text"], LOG) == cluster.EXIT_FAILED
        monkeypatch.undo()
    assert capsys.readouterr().err == "tvq: standard output cannot be written (No space left on device)\n"


def test_texts_that_cannot_be_kept_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(atomic, "write", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert sample.keep(["one", "two"], epath.Path(tmp_path), LOG) == cluster.EXIT_FAILED
    out, err = capsys.readouterr()
    assert "one\n--- sample 2 of 2 ---\ntwo\n" in out
    assert "cannot write there (No space left); here are the texts" in err


def test_text_that_a_vocabulary_does_not_read(tmp_path):
    pieces, path = books.vocabulary(), epath.Path(tmp_path) / "document"
    path.write_bytes(b"caf\xe9")
    assert len(sample.read_document(path, BYTES)) == 4
    with pytest.raises(
        ValueError, match=r"--document=.* is not UTF-8, which a model of sentencepiece needs.*byte 3"
    ):
        sample.read_document(path, pieces)
    assert len(sample.encoded(BYTES, "caf\udce9")) == 4
    for vocabulary, prompt in ((pieces, "caf\udce9"), (BYTES, "\ud800")):
        with pytest.raises(
            ValueError, match=f"a prompt is not UTF-8, which a model of {vocabulary.name}"
        ) as error:
            sample.encoded(vocabulary, prompt)
        assert isinstance(error.value, InputError)

"""What is asked of a model, and the text of its answer while it is drawn."""

import numpy as np
import pytest
from etils import epath

from tvq import sample
from tvq.data.vocabulary import END, ByteVocabulary

BYTES = ByteVocabulary()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("text", ["aé漢😀z".encode(), b"a\xff\xf0\x9f\x98b\xe6", "é".encode()[:1], b""])
def test_pieces_of_text_hold_whole_characters(text, n):
    ids = BYTES.encode(b"say: " + text)
    drawn = [ids[i : i + n] for i in range(5, len(ids), n)] + [np.array([END])]
    pieces = list(sample.spoken(BYTES, ids[:5], drawn))
    want = (b"say: " + text).decode(errors="replace")
    assert "".join(pieces) == want
    # Nothing said is taken back: what is broken is said once that is certain.
    if "\ufffd" not in want:
        assert not any("\ufffd" in piece for piece in pieces)


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

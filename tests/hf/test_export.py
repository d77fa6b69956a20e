"""What `tvq export --format=hf` writes, without transformers; and that `tvq import` reads it back."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tests.data import books
from tests.programs.test_interop import PLACE, RUN, bring_in, newest, original_arrays, original_file
from tvq import cluster, config, hf
from tvq.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, train_sentencepiece
from tvq.hf import tokenizer
from tvq.programs import interop
from tvq.run import tensors

TEXTS = [
    "", " ", "a", "  two  spaces ", "tabs\tand\nlines\r\n\n", "</s><pad><unk> are text", "shé kalo, miká.\n",
    "κόσμε", "Привет, мир", "你好世界", "こんにちは", "안녕하세요", "مرحبا بالعالم", "שלום", "สวัสดี", "नमस्ते",
    "ﬁ ﬃ Å ½",    "🙂👩‍👩‍👧", "a\u200bb\u00a0c\u3000d", "\x00\x01\x1b[0m\x7f", "▁ already", "x" * 300,
]  # fmt: skip


def export(workdir: Path, folder: Path) -> None:
    with contextlib.closing(cluster.Log(workdir / "logs", PLACE)) as log:
        assert interop.send_out(RUN, epath.Path(workdir), PLACE, log, output=str(folder), format="hf") == 0


def test_import_reads_it_back_bitwise(tmp_path, capsys):
    first, second, folder = (tmp_path / name for name in ("first", "second", "folder"))
    bring_in(RUN, first, original_file(tmp_path / "given", original_arrays(RUN)))
    export(first, folder)
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "modeling_tvq.py",
        "configuration_tvq.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert config.build(config.recorded(epath.Path(folder) / config.FILE)) == RUN
    bring_in(RUN, second, folder)
    a, b = newest(first, RUN), newest(second, RUN)
    assert tensors.fingerprint(a.state._replace(key=())) == tensors.fingerprint(b.state._replace(key=()))
    assert (a.step, a.data) == (b.step, b.data)


def test_the_config_names_code_that_is_there():
    written = hf.files(RUN)
    told = json.loads(written["config.json"])
    assert told["dtype"] == RUN.model.param_dtype
    for name in told["auto_map"].values():
        module, _, cls = name.partition(".")
        assert f"class {cls}(" in written[f"{module}.py"]
    assert told["architectures"] == [told["auto_map"]["AutoModelForCausalLM"].partition(".")[2]]
    assert json.loads(written["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def test_the_code_needs_neither_jax_nor_tvq():
    for name in hf.CODE:
        text = hf.files(RUN)[name]
        assert "import jax" not in text
        assert "from tvq" not in text
        assert "import tvq" not in text


@pytest.mark.parametrize("attention", ["full", "flash"])
def test_a_model_of_other_attention_is_refused(attention):
    c = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, attention=attention))
    with pytest.raises(ValueError, match=f"--format=hf: config.model.attention is {attention}"):
        hf.files(c)


def test_images_have_no_tokenizer():
    assert hf.tokenizer_of(ByteVocabulary(), 32, pytest.fail) == {}


def trained(**options: object) -> SentencePieceVocabulary:
    """Pieces that SentencePiece trains with other options than ours."""
    package = pytest.importorskip("sentencepiece")
    model = Path(str(options.pop("to")))
    with model.open("wb") as file:
        package.SentencePieceTrainer.train(
            sentence_iterator=iter(books.book(0).split("\n")), model_writer=file,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
            **{"vocab_size": 100, "model_type": "bpe"} | options,
        )  # fmt: skip
    return SentencePieceVocabulary(model.read_bytes())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"model_type": "unigram"}, "is not BPE"),
        ({"model_type": "word"}, "is not BPE"),
        ({"byte_fallback": True, "vocab_size": 400}, "has pieces of bytes or of its user"),
        ({"user_defined_symbols": ["kalo"]}, "has pieces of bytes or of its user"),
        ({"treat_whitespace_as_suffix": True}, "marks the ends of words"),
        ({"remove_extra_whitespaces": False}, "keeps runs of spaces"),
    ],
)
def test_pieces_that_cannot_be_expressed(options, what, tmp_path):
    vocabulary, said = trained(to=tmp_path / "model", **options), []
    with pytest.raises(ValueError, match=f"the SentencePiece model {what}"):
        tokenizer.files(vocabulary)
    assert hf.tokenizer_of(vocabulary, 0, said.append) == {}
    assert [line.partition(": the Sent")[0] for line in said] == ["warning: the folder has no tokenizer"]


VOCABULARIES = {
    "bytes": lambda to: ByteVocabulary(),
    "ours": lambda to: train_sentencepiece(iter([*books.book(0).split("\n"), *TEXTS]), 300),
    "identity": lambda to: trained(to=to, normalization_rule_name="identity", add_dummy_prefix=False),
    "across_spaces": lambda to: trained(to=to, split_by_whitespace=False),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_library_gives_the_same_ids(name, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = VOCABULARIES[name](tmp_path / "model")
    theirs = tokenizers.Tokenizer.from_str(tokenizer.files(vocabulary)["tokenizer.json"])
    theirs.encode_special_tokens = True
    assert theirs.get_vocab_size() == vocabulary.size
    for text in [*TEXTS, *books.book(1).split("\n"), books.book(2)]:
        want = vocabulary.encode(text.encode())
        np.testing.assert_array_equal(theirs.encode(text).ids, [1, *want], err_msg=repr(text))
        assert theirs.decode(want.tolist()).encode() == vocabulary.decode(want) or 2 in want


def test_bytes_without_the_library():
    model = json.loads(tokenizer.files(ByteVocabulary())["tokenizer.json"])["model"]
    assert sorted(model["vocab"].values()) == list(range(259))
    assert [model["vocab"][character] for character in "!~¡ÿĀ"] == [36, 129, 164, 258, 3]
    assert model["merges"] == []

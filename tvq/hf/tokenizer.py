"""A vocabulary as the `tokenizer.json` of the library tokenizers, with the same ids: plain JSON."""

import base64
import json
from typing import Any

from tvq.data import optional
from tvq.data.vocabulary import N_SPECIAL, ByteVocabulary, SentencePieceVocabulary, Vocabulary
from tvq.errors import InputError
from tvq.schema import END, PAD, UNKNOWN

SPECIAL = ["<pad>", "</s>", "<unk>"]
# One token a byte, under the visible character that stands for it.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
SPACE = "▁"  # in pieces


def files(vocabulary: Vocabulary) -> dict[str, str]:
    """`tokenizer.json` and `tokenizer_config.json`. InputError: the library cannot express the vocabulary."""
    if isinstance(vocabulary, SentencePieceVocabulary):
        special, pipeline = pieces(vocabulary)
    else:
        assert isinstance(vocabulary, ByteVocabulary), vocabulary.name
        special, pipeline = SPECIAL, of_bytes()
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **plain, "special": True} for i, name in enumerate(special)
        ],
        "normalizer": None,
        "post_processor": begun(special[END]),
        **pipeline,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[END],
        "eos_token": special[END],
        "pad_token": special[PAD],
        "unk_token": special[UNKNOWN],
        "padding_side": "left",
        "split_special_tokens": True,  # or `</s>` in a text would end it
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=1) + "\n",
    }


def begun(end: str) -> dict[str, Any]:
    """An end id begins each document."""
    special = lambda i: {"SpecialToken": {"id": end, "type_id": i}}
    text = lambda name, i: {"Sequence": {"id": name, "type_id": i}}
    return {
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": {end: {"id": end, "ids": [END], "tokens": [end]}},
    }


def of_bytes() -> dict[str, Any]:
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    character = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    ids = {name: i for i, name in enumerate(SPECIAL)} | {character[i]: N_SPECIAL + i for i in range(256)}
    model = {"type": "BPE", "vocab": ids, "merges": []}
    return {"model": model, "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}


def pieces(vocabulary: SentencePieceVocabulary) -> tuple[list[str], dict[str, Any]]:
    """Names of the special ids, and the rest. InputError: SentencePiece does what cannot be expressed."""
    proto = optional.load("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(vocabulary.model)
    spec, trainer, kind = proto.normalizer_spec, proto.trainer_spec, type(proto).SentencePiece
    names, ordinary = [piece.piece for piece in proto.pieces], proto.pieces[N_SPECIAL:]
    beyond = {
        "is not BPE": trainer.model_type != trainer.BPE,
        "has pieces of bytes or of its user": any(piece.type != kind.NORMAL for piece in ordinary),
        "marks the ends of words": trainer.treat_whitespace_as_suffix,
        "keeps runs of spaces": not (spec.remove_extra_whitespaces and spec.escape_whitespaces),
    }
    if any(beyond.values()):
        what = " and ".join(text for text, holds in beyond.items() if holds)
        raise InputError(f"the SentencePiece model {what}, which tokenizer.json cannot express")
    model = {
        "type": "BPE",
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": merges(ordinary),
        "unk_token": names[UNKNOWN],
        "fuse_unk": True,
    }
    replace = lambda pattern, text: {"type": "Replace", "pattern": {"Regex": pattern}, "content": text}
    steps: list[dict[str, Any]] = [replace(r"\A +| +\z", ""), replace(" {2,}", " ")]
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": charsmap})
    spaces = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always" if spec.add_dummy_prefix else "never",
        "split": not any(SPACE in piece.piece[1:] for piece in ordinary),
    }
    normalizer = {"type": "Sequence", "normalizers": steps}
    pipeline = {"model": model, "normalizer": normalizer, "pre_tokenizer": spaces, "decoder": spaces}
    return names[:N_SPECIAL], pipeline


def merges(ordinary: Any) -> list[list[str]]:
    """The pairs that are one piece, the best piece first."""
    known = {piece.piece for piece in ordinary}
    best = sorted(ordinary, key=lambda piece: -piece.score)
    cuts = ((piece.piece[:i], piece.piece[i:]) for piece in best for i in range(1, len(piece.piece)))
    return [[left, right] for left, right in cuts if left in known and right in known]

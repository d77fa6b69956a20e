"""What tests/hf/test_modeling.py reads: exported folders, token ids, and the log-probabilities of tvq.

    python -m tests.hf.cases FOLDER

This needs jax and no torch; the test needs torch and transformers, and neither jax nor tvq.
"""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tests.fakes.pod import QUICK_TO_COMPILE
from tests.model import small
from tests.test_parity import GOLDEN, load, model_config, under, weights
from tvq import __main__, config, hf, schema
from tvq import model as lm
from tvq.data.vocabulary import ByteVocabulary
from tvq.programs import interop
from tvq.run import tensors

# Each option of the model that is not in a golden file's.
OPTIONS = {
    "apart": {"attend_across_documents": False},
    "apart_scaled": {"attend_across_documents": False, "pe_abs": True, "e_scale": 0.7, "e_preln": True},
    "apart_window": {"attend_across_documents": False, "agg_cache": False, "e_tie": True, "n_head": 1},
    "revived": {"revive_codes": 3, "block_len": 1, "mem_len": 1},
    "float64": {"dtype": "float64", "param_dtype": "float64", "attend_across_documents": False},
    "bfloat16": {"dtype": "bfloat16", "attend_across_documents": False},
}


def write(folder: Path, model: schema.Model, given: lm.Weights) -> None:
    """What `tvq export --format=hf` writes, without a run."""
    tensors.write(epath.Path(folder) / interop.WEIGHTS, tensors.named(interop.in_file(given)), {})
    texts = hf.files(schema.Config(model=model)) | hf.tokenizer_of(ByteVocabulary(), 0, print)
    for name, text in texts.items():
        (folder / name).write_text(text)


def expect(folder: Path, inputs: np.ndarray, **expected: Any) -> None:
    """Token ids, and what is to come of them, beside the model."""
    np.savez(folder / "expected.npz", inputs=inputs, **expected)


def ours(given: lm.Weights, inputs: np.ndarray, model: schema.Model) -> dict[str, np.ndarray]:
    """Log-probabilities of tvq: all tokens in parallel, and one by one."""
    B, T = inputs.shape
    ids = jnp.asarray(inputs, jnp.int32)
    tail = -T % model.block_len
    padded = jnp.pad(ids, [(0, 0), (0, tail)])

    @jax.jit
    def both(given, ids, padded):
        empty = lm.start(model, B)
        x, *_ = lm.forward(given, padded, jnp.ones_like(padded), empty, model)
        step = lambda state, token_B: lm.step(given, token_B, state, model)[::-1]
        _, one_by_one = jax.lax.scan(step, lm.begin(given, empty, model), ids.T)
        return lm.log_probs(given, x, model)[:, :T], one_by_one.swapaxes(0, 1)

    parallel, one_by_one = both(given, ids, padded)
    return {"parallel": parallel, "one_by_one": one_by_one}


def golden(folder: Path) -> None:
    for path in sorted([*GOLDEN.glob("fwd_*.npz"), *GOLDEN.glob("decode_*.npz")]):
        spec, arrays = load(path)
        model = model_config(spec["transformer_config"])
        if spec["group"] == "forward":
            inputs, expected = arrays["batch/inputs"], {"parallel": arrays["out/logprobs"]}
        else:
            inputs = arrays["batch/inputs"]
            expected = {
                "parallel": arrays["out/logprobs_blockL"],
                "one_by_one": arrays["out/logprobs_block1"],
            }
        write(folder / path.stem, model, weights(under(arrays, "params"), model))
        expect(folder / path.stem, inputs, **expected)


def options(folder: Path) -> None:
    for name, fields in OPTIONS.items():
        model = dataclasses.replace(small.MODEL, n_vocab=259, **fields)
        jax.config.update("jax_enable_x64", model.dtype == "float64")
        given = small.parameters(model)
        # Id 1 ends a document: about one in eight. Where there is an id 0, transformers makes a mask.
        inputs = np.random.default_rng(0).integers(2, 259, (3, 100))
        inputs[np.random.default_rng(1).random(inputs.shape) < 1 / 8] = 1
        write(folder / name, model, given)
        expect(folder / name, inputs, **ours(given, inputs, model))
    jax.config.update("jax_enable_x64", False)


def trained(folder: Path) -> None:
    """A few steps of configs/debug.py, exported by the program; and what `tvq sample` continues."""
    few = ("--config.train.steps=16", "--config.evaluate.every=0", "--config.sample.every=0")
    with tempfile.TemporaryDirectory() as work:
        tvq = lambda *arguments: __main__.main([*arguments, f"--workdir={work}/run", "--quiet"])
        tvq("train", "--config=configs/debug.py", *few)
        tvq("export", f"--output={folder}", "--format=hf")
        tvq("sample", "--prompt=import ", "--length=60", "--temperature=0", f"--output={work}/texts")
        (sample,) = (path.read_text() for path in Path(work, "texts").iterdir())
    c = config.build(config.recorded(epath.Path(folder) / config.FILE))
    given, vocabulary, _ = interop.read_weights(epath.Path(folder), c)
    text = Path(lm.__file__).read_text()[:3000]
    inputs = np.stack([[1, *vocabulary.encode(part.encode())] for part in (text, text[::-1])])
    expect(folder, inputs, **ours(given, inputs, c.model), text=text, sample=sample)


def main(folder: Path) -> None:
    golden(folder)
    options(folder)
    trained(folder / "trained")
    print(f"{len(os.listdir(folder))} folders in {folder}, with jax {jax.__version__}")


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)
    main(Path(sys.argv[1]))

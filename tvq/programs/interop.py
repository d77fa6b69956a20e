"""Weights in and out: files of the original program, and our own."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import serialization, traverse_util

from tvq import atomic, cluster, hf, schema, sharding
from tvq import model as lm
from tvq.config import FILE as CONFIG_FILE
from tvq.config import to_dict
from tvq.data import files
from tvq.data.corpus import open_corpus
from tvq.data.vocabulary import ByteVocabulary, Vocabulary, from_json, to_json
from tvq.errors import InputError
from tvq.programs import evaluate
from tvq.run import metrics, restore, tensors
from tvq.run.checkpoint import Checkpoints, Restored
from tvq.run.workdir import CHECKPOINTS, check_workdir, record
from tvq.schema import Config
from tvq.training import optimizer, state

# What `tvq export` writes beside config.json.
WEIGHTS = "model.safetensors"
Say = Callable[[str], None]


def read_original(path: epath.Path) -> dict[str, np.ndarray]:
    """The parameters by path in a flax msgpack of its TrainState or parameters. InputError: it is neither."""
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except OSError as error:
        raise InputError(f"--input={path}: cannot read it ({error.strerror})") from error
    except Exception as error:  # msgpack's errors have no common class
        raise InputError(f"--input={path} is not a flax msgpack file, or is damaged: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"--input={path} is not a flax msgpack file: it holds no names")
    while isinstance(tree.get("params"), dict):
        tree = tree["params"]
    flat = {"/".join(map(str, names)): x for names, x in traverse_util.flatten_dict(tree).items()}
    other = sorted(name for name, x in flat.items() if not isinstance(x, np.ndarray | np.generic))
    if other:
        raise InputError(
            f"--input={path} holds no parameters of the original program: {other[0]} is not an array but"
            f" {flat[other[0]]!r:.60}"
        )
    return {name: np.asarray(x) for name, x in flat.items()}


def read_weights(path: epath.Path, config: Config, say: Say = print) -> tuple[lm.Weights, Vocabulary, int]:
    """Weights, vocabulary and image size: from a file of the original program, or our folder or file.

    InputError: it is neither, or its arrays are not those of the model; each that differs is listed.
    """
    if is_ours(path):
        arrays, facts = tensors.read("--input", path / WEIGHTS if path.is_dir() else path)
        like = in_file(jax.eval_shape(lambda: lm.init(config.model, jax.random.key(0))))
        arrays = check(path, arrays, {name: tensors.kind(x) for name, x in tensors.named(like).items()}, say)
        tree = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in tensors.named(like)])
        return lm.Weights(tree.pop("params"), tree), *what_it_reads(path, facts, config)
    vocabulary = vocabulary_of(config)
    arrays = check(path, read_original(path), lm.original.kinds(config.model), say)
    return lm.original.weights(arrays, config.model), vocabulary, 0


def what_it_reads(path: epath.Path, facts: dict[str, str], config: Config) -> tuple[Vocabulary, int]:
    """Vocabulary and image size, as `tvq export` recorded them in the file; else those of config.data.

    InputError: they are damaged, or the data is missing.
    """
    if "vocabulary" in facts and "image_size" in facts:
        try:
            return from_json(json.loads(facts["vocabulary"])), int(facts["image_size"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"--input={path}: its record of the vocabulary is damaged: {error}") from error
    if (
        config.model.n_vocab == ByteVocabulary().size
        and config.data.source != "tokens"
        and not config.data.mix
    ):
        return ByteVocabulary(), 0
    try:
        corpus = open_corpus(config.data)
        evaluate.check_vocabulary(corpus, config.model)
    except InputError as error:
        raise InputError(
            f"--input={path} has lost the vocabulary and image size that tvq export recorded, as when another"
            f" program saves it again; set config.data to the training data, which has both: {error}"
        ) from error
    return corpus.vocabulary, corpus.image_size


def is_ours(path: epath.Path) -> bool:
    """What `tvq export` wrote, not the original program."""
    return path.is_dir() or path.suffix == epath.Path(WEIGHTS).suffix


def recorded_config(*, input: str) -> epath.Path:  # noqa: A002
    """The config that `tvq export` wrote beside the weights. InputError: there is none."""
    path = epath.Path(input)
    if is_ours(path) and not path.is_dir():
        path = path.parent
    if not (path / CONFIG_FILE).exists():
        raise InputError(f"--input={input} comes without {CONFIG_FILE}; give --config")
    return path / CONFIG_FILE


def in_file(weights: lm.Weights) -> dict:
    """The tree with the names of a weights file: `params.units.q`, `codebooks.sum`."""
    return {"params": weights.params, **weights.extra}


def check(
    path: epath.Path, arrays: Mapping[str, np.ndarray], wanted: dict[str, str], say: Say
) -> dict[str, np.ndarray]:
    """The arrays in the wanted dtypes: they are converted if only floating-point dtypes differ.

    InputError lists each array that is missing, not wanted, of another shape or dtype, or not finite.
    """
    kinds = {name: tensors.kind(x) for name, x in arrays.items()}
    differing = tensors.differing(kinds, wanted, "in the file")
    if arrays and not arrays.keys() & wanted.keys():
        raise InputError(
            f"--input={path} holds no array with a name of the model; it has {files.listed(arrays)}, not"
            f" {files.listed(wanted)}"
        )
    shape_of = lambda kind: kind.partition("[")[2]
    is_converted = kinds.keys() == wanted.keys() and all(
        shape_of(kinds[name]) == shape_of(wanted[name]) and jnp.issubdtype(x.dtype, jnp.floating)
        for name, x in arrays.items()
    )
    if differing and not is_converted:
        raise InputError(
            f"--input={path} holds another model than the config: {len(differing)} arrays differ;"
            " set config.model to the model that was trained\n" + "\n".join(differing)
        )
    if differing:
        say(f"{len(differing)} arrays of {path} are converted, such as {differing[0].strip()}")
    with np.errstate(over="ignore"):
        converted = {name: x.astype(jnp.dtype(wanted[name].partition("[")[0])) for name, x in arrays.items()}
    broken = [name for name, x in converted.items() if not np.isfinite(x).all()]
    if broken:
        raise InputError(f"--input={path} holds numbers that are not finite, in {files.listed(broken)}")
    return converted


def bring_in(
    config: Config,
    workdir: epath.Path,
    place: cluster.Place,
    log: cluster.Log,
    *,
    input: str,  # noqa: A002
) -> int:
    """Makes a run at step 0 from weights, with a new optimizer. InputError: they are wrong."""
    place.check_alone("import")
    if (workdir / CONFIG_FILE).exists() or (workdir / CHECKPOINTS).exists():
        raise InputError(f"--workdir={workdir} holds a run already; use another folder")
    check_workdir(workdir, config)
    console = metrics.Console()
    weights, vocabulary, image_size = read_weights(epath.Path(input), config, console.say)
    tx = optimizer.make(config.optimizer, config.model)
    whole = sharding.sharding(sharding.make(schema.Mesh(), jax.devices()[:1]), sharding.WHOLE)

    def begin(weights: lm.Weights) -> state.TrainState:
        return state.init(config.model, tx, config.train.seed, weights)

    now = jax.jit(begin, out_shardings=whole)(weights)
    data: dict[str, Any] = {"fingerprint": None, "seconds": {}}
    data |= {"vocabulary": to_json(vocabulary), "image_size": image_size}
    with cluster.writing("--workdir", workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(workdir / CHECKPOINTS, keep=config.checkpoint.keep, keep_every=0) as checkpoints:
        checkpoints.save(0, now, data, to_dict(config))
    record(workdir, config, log)  # last: without it the folder is no run
    console.say(
        f"{state.n_param(now):,} parameters of {input} are checkpoint 0 of {workdir}; it has no optimizer"
        " state: training continues from these weights with a new one and the schedule's warm-up"
    )
    if not is_ours(epath.Path(input)) and not config.model.attend_across_documents:
        console.say(
            "warning: these weights come from a program that attends across documents, and"
            " config.model.attend_across_documents is false; for that program's results import them with"
            " --config.model.attend_across_documents=true"
        )
    return 0


def send_out(
    config: Config,
    workdir: epath.Path,
    place: cluster.Place,
    log: cluster.Log,
    *,
    output: str,
    format: str = "tvq",  # noqa: A002
    at: int | None = None,
) -> int:
    """Writes the newest weights by name, or a step's, the config of the run, and a tokenizer.

    With `hf` they come with all that transformers needs besides. The weights are the same.
    """
    place.check_alone("export")
    check_output(output)
    restored = restore.weights(config, workdir, sharding.make(schema.Mesh(), jax.devices()[:1]), log.say, at)
    metrics.Console().say(write(config, output, restored, {}, f"step {restored.step:,}", format))
    return 0


def check_output(output: str) -> None:
    """InputError if the folder for weights holds something already."""
    folder = epath.Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output={output} is not an empty folder; use another")


def write(
    config: Config,
    output: str,
    restored: Restored,
    more: dict[str, str],
    what: str,
    format: str = "tvq",  # noqa: A002
) -> str:
    """Writes the weights of `what`, with `more` facts about them, and the config; returns a line about it."""
    folder, now = epath.Path(output), restored.state
    arrays = tensors.named(in_file(now.weights))
    kept = {name: json.dumps(restored.data[name]) for name in ("vocabulary", "image_size")}
    facts, say = {"step": str(restored.step), **kept, **more}, metrics.Console().say
    texts = {CONFIG_FILE: json.dumps(to_dict(config), indent=1) + "\n"}
    if format == "hf":
        facts["format"] = "pt"  # the word of transformers for these names and dims
        texts = hf.files(config)
    texts |= hf.tokenizer_of(from_json(restored.data["vocabulary"]), restored.data["image_size"], say)
    with cluster.writing("--output", folder):
        n_byte = tensors.write(folder / WEIGHTS, arrays, facts)
        for name, text in texts.items():
            atomic.write(folder / name, text)
    return f"{state.n_param(now):,} parameters of {what} are in {folder}: {n_byte / 1e6:,.1f} MB"


def vocabulary_of(config: Config) -> Vocabulary:
    """Bytes if the model has that many ids, else the data's: the original program's files hold none."""
    if config.model.n_vocab == ByteVocabulary().size:
        return ByteVocabulary()
    corpus = open_corpus(config.data)
    evaluate.check_vocabulary(corpus, config.model)
    return corpus.vocabulary

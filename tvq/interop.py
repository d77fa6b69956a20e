"""Weights in and out, and the names and layout of the original program's arrays (issues 2 and 6)."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import serialization, traverse_util

from tvq import atomic, cluster, config, evaluate, mesh, metrics, optimizer, state, tensors
from tvq.checkpoint import Checkpoints
from tvq.config import Config, Model
from tvq.data.corpus import open_corpus
from tvq.data.vocabulary import ByteVocabulary, Vocabulary, from_json, to_json
from tvq.errors import InputError
from tvq.model import attention, transformer
from tvq.workdir import check_workdir, record

# What `tvq export` writes beside config.json.
WEIGHTS = "model.safetensors"
Say = Callable[[str], None]

# Within one of its attention modules -> within one of our units, or a codebook entry.
UNIT_NAMES = {
    "input_ln/g": "norm/gain",
    "input_ln/b": "norm/bias",
    "q_proj/kernel": "q",
    "kvg_proj/kernel": "kvg",
    "r_proj/kernel": "r",
    "u": "u",
    "v": "w",
    "res_proj/kernel": "out",
}
CODEBOOK_NAMES = {"quantizer/c_sum": "sum", "quantizer/c_count": "count"}
OTHER_NAMES = {
    "token_embedder/embs": "embed/table",
    "token_embedder/bias_out": "embed/bias",
    "position_embedder/scale": "position/scale",
    "out_ln/g": "out_norm/gain",
    "out_ln/b": "out_norm/bias",
    "out_proj/kernel": "out/kernel",
    "out_proj/bias": "out/bias",
}


def nested(flat: Mapping[str, Any]) -> dict:
    """`{"a/b": x}` as `{"a": {"b": x}}`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def parameters_from_original(original: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
    """Our (params, codebooks) from its arrays by path, `transformer_layers_I/scanned_attnJ/...`.

    Where the output is not tied it holds a bias of the embedding that nothing reads; we have none.
    InputError lists names that are not known.
    """
    params, codebooks = renamed(original)
    units = params["units"]
    kvg, width_k = units.pop("kvg"), units["q"].shape[-1]
    width_v = (kvg.shape[-1] - width_k) // 2
    pieces = np.split(kvg, [width_k, width_k + width_v], axis=-1)
    units.update(zip(("k", "v", "g"), pieces, strict=True))
    return params, codebooks


def renamed(original: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
    """The same with keys, values and gates in one array `units/kvg`, as it has them.

    Its attention modules are stacked in order.
    """
    names = {f"units/{old}": f"units/{new}" for old, new in UNIT_NAMES.items()}
    names |= {f"units/{old}": f"codebooks/{new}" for old, new in CODEBOOK_NAMES.items()} | OTHER_NAMES
    units: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    ours: dict[str, Any] = {}
    unknown = []
    for path, value in original.items():
        if path.startswith("transformer_layers_"):
            layer, module, rest = path.split("/", 2)
            place = int(layer.rpartition("_")[2]), int(module.removeprefix("scanned_attn"))
            units.setdefault(f"units/{rest}", {})[place] = value
        elif path in names:
            ours[names[path]] = value
        else:
            unknown.append(path)
    for path, by_place in units.items():
        if path in names:
            ours[names[path]] = np.stack([by_place[place] for place in sorted(by_place)])
        else:
            unknown.append(path)
    if unknown:
        raise InputError(f"no parameters of the original program: {', '.join(sorted(unknown))}")
    if "out/kernel" in ours:
        ours.pop("embed/bias", None)
    tree = nested(ours)
    codebooks = tree.pop("codebooks", {})
    return tree, codebooks


def state_from_original(original: Mapping[str, np.ndarray]) -> transformer.State:
    """Our attention state from its arrays by path, `layer/unit/...`; document ids, never read, go."""
    places = sorted({tuple(int(i) for i in path.split("/")[:2]) for path in original})
    stack = lambda name: jnp.stack([original[f"{i}/{j}/{name}"] for i, j in places])
    count = stack("aggcache/lower")
    units = attention.State(
        z_BHM=stack("xlcache/z"),
        k_BHMK=stack("xlcache/k_hat"),
        v_BHMV=stack("xlcache/v"),
        count_BHS=count,
        sum_BHSV=stack("aggcache/upper_div_lower") * count[..., None],
    )
    return transformer.State(jnp.asarray(original[f"{places[0][0]}/{places[0][1]}/pos_offset"]), units)


def original_kinds(model: Model) -> dict[str, str]:
    """The original program's parameters for a config: `{path: "float32[D, K]"}`."""
    D, H, K, V = model.d_model, model.n_head, model.d_k, model.d_v
    C, S = model.n_vocab, model.n_code
    unit = {
        "input_ln/g": (D,),
        "input_ln/b": (D,),
        "q_proj/kernel": (D, H * K),
        "kvg_proj/kernel": (D, H * K + 2 * H * V),
        "r_proj/kernel": (D, H * K),
        "u": (H * K,),
        "v": (H * K,),
        "res_proj/kernel": (H * V, D),
        "quantizer/c_sum": (H, S, K),
        "quantizer/c_count": (H, S),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"transformer_layers_{i}/scanned_attn{j}/{name}": shape
        for i in range(model.n_layer)
        for j in (1, 2)
        for name, shape in unit.items()
    }
    shapes |= {"token_embedder/embs": (C, D), "token_embedder/bias_out": (C,)}
    if model.pe_abs:
        shapes["position_embedder/scale"] = ()
    if model.e_preln:
        shapes |= {"out_ln/g": (D,), "out_ln/b": (D,)}
    if not model.e_tie:
        shapes |= {"out_proj/kernel": (D, C), "out_proj/bias": (C,)}
    return {path: f"{model.param_dtype}{list(shape)}" for path, shape in shapes.items()}


def read_original(path: epath.Path) -> dict[str, np.ndarray]:
    """The parameters by path in a flax msgpack of its TrainState or parameters. InputError: no such."""
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except OSError as error:
        raise InputError(f"--input={path}: cannot read it ({error.strerror})") from error
    except Exception as error:  # msgpack has no common word for what it cannot read
        raise InputError(f"--input={path} is no msgpack of flax, or a damaged one: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"--input={path} is no msgpack of flax: it holds no names")
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


def read_weights(path: epath.Path, c: Config, say: Say = print) -> tuple[dict, dict, Vocabulary, int]:
    """Params, codebooks, vocabulary, side of images: of the original's file, or of our folder or file.

    InputError: it is neither, or its arrays are not those of the model; each that differs is listed.
    """
    if is_ours(path):
        arrays, facts = tensors.read("--input", path / WEIGHTS if path.is_dir() else path)
        like = dict(zip(("params", "codebooks"), jax.eval_shape(lambda: _init(c.model)), strict=True))
        arrays = check(path, arrays, {name: tensors.kind(x) for name, x in tensors.named(like).items()}, say)
        tree = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in tensors.named(like)])
        return tree["params"], tree["codebooks"], *what_it_reads(path, facts, c)
    vocabulary = vocabulary_of(c)
    arrays = check(path, read_original(path), original_kinds(c.model), say)
    return *parameters_from_original(arrays), vocabulary, 0


def what_it_reads(path: epath.Path, facts: dict[str, str], c: Config) -> tuple[Vocabulary, int]:
    """Vocabulary and side of images, as `tvq export` noted them in the file; else those of config.data.

    InputError: they are damaged, or the data is not there.
    """
    if "vocabulary" in facts and "image_size" in facts:
        try:
            return from_json(json.loads(facts["vocabulary"])), int(facts["image_size"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"--input={path}: what it notes of its vocabulary is damaged: {error}"
            ) from error
    if c.model.n_vocab == ByteVocabulary().size and c.data.source != "tokens" and not c.data.mix:
        return ByteVocabulary(), 0
    try:
        corpus = open_corpus(c.data)
        evaluate.check_vocabulary(corpus, c.model)
    except InputError as error:
        raise InputError(
            f"--input={path} has lost what tvq export noted in it of vocabulary and images, as when another"
            f" program saves it again; set config.data to the data of training, which has both: {error}"
        ) from error
    return corpus.vocabulary, corpus.image_size


def is_ours(path: epath.Path) -> bool:
    """What `tvq export` wrote, not the original program."""
    return path.is_dir() or path.suffix == epath.Path(WEIGHTS).suffix


def _init(model: Model) -> tuple[dict, dict]:
    return transformer.init(model, jax.random.key(0))


def check(
    path: epath.Path, arrays: Mapping[str, np.ndarray], wanted: dict[str, str], say: Say
) -> dict[str, np.ndarray]:
    """The arrays, of the wanted dtypes: where nothing but floating-point dtypes differs they are converted.

    InputError lists each array that is missing, not wanted, of another shape or dtype, or not finite.
    """
    kinds = {name: tensors.kind(x) for name, x in arrays.items()}
    differing = tensors.differing(kinds, wanted, "in the file")
    if arrays and not arrays.keys() & wanted.keys():
        raise InputError(
            f"--input={path} holds no array of the model under its name; it has {_some(arrays)}, not"
            f" {_some(wanted)}"
        )
    shape_of = lambda kind: kind.partition("[")[2]
    is_converted = kinds.keys() == wanted.keys() and all(
        shape_of(kinds[name]) == shape_of(wanted[name]) and jnp.issubdtype(x.dtype, jnp.floating)
        for name, x in arrays.items()
    )
    if differing and not is_converted:
        raise InputError(
            f"--input={path} holds another model than the config: {len(differing)} arrays differ;"
            " set config.model to what it was trained with\n" + "\n".join(differing)
        )
    if differing:
        say(f"{len(differing)} arrays of {path} are converted, as {differing[0].strip()}")
    with np.errstate(over="ignore"):
        found = {name: x.astype(jnp.dtype(wanted[name].partition("[")[0])) for name, x in arrays.items()}
    broken = [name for name, x in found.items() if not np.isfinite(x).all()]
    if broken:
        raise InputError(f"--input={path} holds numbers that are not finite, in {_some(broken)}")
    return found


def _some(names: Iterable[str]) -> str:
    """`a, b, c and 5 more`."""
    found = sorted(names)
    text = ", ".join(found[:3])
    return f"{text} and {len(found) - 3} more" if len(found) > 3 else text


def bring_in(c: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log, *, input: str) -> int:  # noqa: A002
    """Makes a run at step 0 of weights, with a fresh optimizer. InputError: wrong ones, nothing written."""
    one_process(place, "import")
    if (workdir / config.FILE).exists() or (workdir / "checkpoints").exists():
        raise InputError(f"--workdir={workdir} holds a run already; use another folder")
    check_workdir(workdir, c)
    console = metrics.Console()
    params, codebooks, vocabulary, image_size = read_weights(epath.Path(input), c, console.say)
    tx = optimizer.make(c.optimizer)
    whole = mesh.sharding(mesh.make(config.Mesh(), jax.devices()[:1]), mesh.WHOLE)

    def begin(params: dict, codebooks: dict) -> state.TrainState:
        fresh = state.init(c.model, tx, c.train.seed)  # of which only the key stays
        return fresh._replace(params=params, codebooks=codebooks, opt_state=tx.init(params))

    now = jax.jit(begin, out_shardings=whole)(params, codebooks)
    data = {"next_batch": 0, "fingerprint": None, "seconds": {}}
    data |= {"vocabulary": to_json(vocabulary), "image_size": image_size}
    with cluster.writing("--workdir", workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(workdir / "checkpoints", keep=c.checkpoint.keep, keep_every=0) as checkpoints:
        checkpoints.save(0, now, data, config.to_dict(c))
    record(workdir, c, log)  # last: without it the folder is no run
    console.say(
        f"{state.n_param(now):,} parameters of {input} are checkpoint 0 of {workdir}; it has no optimizer"
        " state: training goes on from these weights with a fresh one and the schedule's warm-up"
    )
    if not is_ours(epath.Path(input)) and not c.model.attend_across_documents:
        console.say(
            "warning: these weights come from a program that attends across documents, and"
            " config.model.attend_across_documents is false; for that program's results import them with"
            " --config.model.attend_across_documents=true"
        )
    return 0


def send_out(c: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log, *, output: str) -> int:
    """Writes parameters and codebooks of the newest checkpoint, by name, and the config of the run."""
    one_process(place, "export")
    folder = epath.Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output={output} is not an empty folder; use another")
    restored = evaluate.restore(c, workdir, mesh.make(config.Mesh(), jax.devices()[:1]), log.say)
    now = restored.state
    arrays = tensors.named({"params": now.params, "codebooks": now.codebooks})
    kept = {name: json.dumps(restored.data[name]) for name in ("vocabulary", "image_size")}
    facts = {"step": str(restored.step), **kept}
    with cluster.writing("--output", folder):
        n_byte = tensors.write(folder / WEIGHTS, arrays, facts)
        atomic.write(folder / config.FILE, json.dumps(config.to_dict(c), indent=1) + "\n")
    metrics.Console().say(
        f"{state.n_param(now):,} parameters of step {restored.step:,} are in {folder}: {n_byte / 1e6:,.1f} MB"
    )
    return 0


def vocabulary_of(c: Config) -> Vocabulary:
    """Bytes where the model has as many ids, else that of the data: the original's files have none."""
    if c.model.n_vocab == ByteVocabulary().size:
        return ByteVocabulary()
    corpus = open_corpus(c.data)
    evaluate.check_vocabulary(corpus, c.model)
    return corpus.vocabulary


def one_process(place: cluster.Place, command: str) -> None:
    if place.n_process > 1:
        raise InputError(f"tvq {command} is for one process, but {place}; start it by itself")

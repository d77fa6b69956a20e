"""Names and layout of the original program's arrays; its files hold one array per attention module."""

from collections.abc import Mapping

import numpy as np
from flax.traverse_util import unflatten_dict

from tvq.errors import InputError
from tvq.model import parameters
from tvq.model.parameters import Weights
from tvq.schema import Model

# Stored with every embedding; if the output is not tied nothing reads it, and this program has none.
UNUSED = "token_embedder/bias_out"


def modules(config: Model) -> list[str]:
    """Its attention modules, in the order of our units."""
    return [f"transformer_layers_{i}/scanned_attn{j}" for i in range(config.n_layer) for j in (1, 2)]


def names(config: Model) -> dict[str, list[str]]:
    """By the path of each of its arrays (within the unit), our arrays that it holds: one, or several."""
    by_original: dict[str, list[str]] = {}
    for path, like in parameters.named(config).items():
        if like.original:
            folder = path.rpartition("/")[0]
            by_original[like.original] = [f"{folder}/{part}" for part in like.parts] or [path]
    return by_original


def kinds(config: Model) -> dict[str, str]:
    """Its arrays for a config: `{path: "float32[D, K]"}`."""
    declared, shapes = parameters.named(config), {}
    for original, paths in names(config).items():
        shape = declared[paths[0]].shape
        if len(paths) > 1:
            shape = (*shape[:-1], sum(declared[path].shape[-1] for path in paths))
        if _is_stacked(declared[paths[0]]):
            shapes |= {f"{module}/{original}": shape[1:] for module in modules(config)}
        else:
            shapes[original] = shape
    shapes.setdefault(UNUSED, (config.n_vocab,))
    return {path: f"{config.param_dtype}{list(shape)}" for path, shape in shapes.items()}


def _is_stacked(like: parameters.Declared) -> bool:
    return like.dims[:1] == ("N",)


def weights(original: Mapping[str, np.ndarray], config: Model, *, joined: bool = False) -> Weights:
    """Ours from its arrays by path.

    `joined` keeps arrays that it stores as one together, as `units/kvg`. InputError lists unknown names.
    """
    declared, ours, left = parameters.named(config), {}, dict(original)
    for name, paths in names(config).items():
        if _is_stacked(declared[paths[0]]):
            there = [f"{module}/{name}" for module in modules(config) if f"{module}/{name}" in left]
            values = [np.stack([left.pop(path) for path in there])] if there else []
        else:
            values = [left.pop(name)] if name in left else []
        if values and len(paths) > 1:
            if joined:
                paths = [f"units/{''.join(declared[paths[0]].parts)}"]
            else:
                widths = [declared[path].shape[-1] for path in paths]
                values = np.split(values[0], np.cumsum(widths)[:-1], axis=-1)
        ours |= dict(zip(paths, values, strict=False))
    left.pop(UNUSED, None)
    if left:
        raise InputError(f"not parameters of the original program: {', '.join(sorted(left))}")
    tree = unflatten_dict(ours, sep="/")
    return Weights(tree, {name: tree.pop(name) for name in ("codebooks",) if name in tree})

"""Names and layout of the original program's arrays, and ours (issue 2: parity)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tvq.model import attention, transformer

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
    ValueError lists names that are not known.
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
        raise ValueError(f"no parameters of the original program: {', '.join(sorted(unknown))}")
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

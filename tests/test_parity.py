"""Every golden file in the folder TVQ_GOLDEN (default tests/golden) against ours.

The files were recorded from the original program; tests/golden/README.md says what each group holds. A new
file of a known group is picked up by itself. An array agrees if its largest deviation is below 1e-5 of its
largest entry.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests import stream
from tvq import schema, sharding
from tvq.model import attention, layers, original, parameters, recurrence, transformer, vq
from tvq.model.parameters import Weights
from tvq.model.unit import gated_unit
from tvq.programs import evaluate
from tvq.run import draw
from tvq.training import optimizer, train_step, transforms
from tvq.training.state import TrainState

GOLDEN = Path(os.environ.get("TVQ_GOLDEN", Path(__file__).parent / "golden"))
FILES = sorted(GOLDEN.glob("*.npz"))
TOLERANCE = 1e-5
# (1 - gamma) (c - f n) is a difference of near numbers: float32 loses what cancels (golden README: 3e-6).
CANCELLING = 3e-5
BFLOAT16 = 3e-2


def load(path: Path) -> tuple[dict, dict]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("config_json"))), arrays


def under(arrays: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix + "/"): v for k, v in arrays.items() if k.startswith(prefix + "/")}


def close(name: str, got: object, want: object, tolerance: float = TOLERANCE) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, golden {want.shape}"
    assert np.isfinite(got.astype(np.float64)).all(), f"{name} is not finite"
    scale = max(np.abs(want).max(initial=0.0), 1e-30)
    error = np.abs(got.astype(np.float64) - want).max(initial=0.0) / scale
    # Where the golden array is all zeros ours must be so too, to rounding.
    assert error <= tolerance or (scale == 1e-30 and np.abs(got).max() < 1e-9), f"{name}: off by {error:.2e}"


def trees_close(name: str, got: object, want: object, tolerance: float = TOLERANCE) -> None:
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want], name
    for (path, a), (_, b) in zip(got, want, strict=True):
        close(name + jax.tree_util.keystr(path), a, b, tolerance)


def model_config(original: dict) -> schema.Model:
    names = {field.name for field in dataclasses.fields(schema.Model)}
    known = {name: value for name, value in original.items() if name in names}
    return schema.Model(**known | {"pe_lam": float(original["pe_lam"]), "attend_across_documents": True})


def on_device(tree: object) -> object:
    return jax.tree.map(jnp.asarray, tree)


def weights(arrays: dict, model: schema.Model) -> Weights:
    return on_device(original.weights(arrays, model))


def state_from_original(arrays: dict) -> transformer.State:
    """Our attention state from its arrays by path, `layer/unit/...`; document ids, never read, go."""
    places = sorted({tuple(int(i) for i in path.split("/")[:2]) for path in arrays})
    stack = lambda name: jnp.stack([arrays[f"{i}/{j}/{name}"] for i, j in places])
    count = stack("aggcache/lower")
    units = attention.State(
        z_BHM=stack("xlcache/z"),
        k_BHMK=stack("xlcache/k_hat"),
        v_BHMV=stack("xlcache/v"),
        count_BHS=count,
        sum_BHSV=stack("aggcache/upper_div_lower") * count[..., None],
    )
    return transformer.State(jnp.asarray(arrays[f"{places[0][0]}/{places[0][1]}/pos_offset"]), units)


def state_close(name: str, got: transformer.State, arrays: dict, tolerance: float = TOLERANCE) -> None:
    want = state_from_original(arrays)
    assert int(got.position) == int(want.position)
    got_units, want_units = jax.tree.map(np.asarray, (got.units, want.units))
    same_z = got_units.z_BHM == want_units.z_BHM
    same_count = got_units.count_BHS == want_units.count_BHS
    if tolerance == TOLERANCE:
        assert same_z.all(), f"{name}: codes differ"
        close(f"{name}.count", got_units.count_BHS, want_units.count_BHS)
    else:
        # Rounded activations may move a key to another code: at most one in a hundred here.
        flips = np.abs(got_units.count_BHS - want_units.count_BHS).sum() / 2
        assert flips <= 0.01 * want_units.count_BHS.sum(), f"{name}: {flips} codes of the cache differ"
        assert same_z.mean() >= 0.99, f"{name}: {(~same_z).sum()} codes of the memory differ"
    pairs = {"k_BHMK": same_z, "v_BHMV": np.ones_like(same_z), "sum_BHSV": same_count}
    for field, same in pairs.items():
        a, b = (np.where(same[..., None], getattr(x, field), 0.0) for x in (got_units, want_units))
        close(f"{name}.{field}", a, b, tolerance)


@functools.partial(jax.jit, static_argnames="model")
def forward(weights, tokens, mask, state, *, model):
    x, state, _, metrics = transformer.forward(weights, tokens, mask, state, model)
    return transformer.log_probs(weights, x, model), state, metrics | transformer.measure(weights)


def check_forward(spec: dict, arrays: dict) -> None:
    model = model_config(spec["transformer_config"])
    # Ours and the original's bfloat16 differ in which tensors are rounded: counts, means and scores are
    # float32 here.
    tolerance = BFLOAT16 if model.dtype == "bfloat16" else TOLERANCE
    given = weights(under(arrays, "params"), model)
    batch = under(arrays, "batch")
    state = transformer.start(model, batch["inputs"].shape[0])
    log_probs, start = [], 0
    for call, n_block in enumerate(spec["call_blocks"]):
        piece = slice(start, start + n_block * model.block_len)
        start = piece.stop
        got, state, metrics = forward(
            given, batch["inputs"][:, piece], batch["loss_mask"][:, piece], state, model=model
        )
        log_probs.append(got)
        if call == 0:
            state_close("state_after_call0", state, under(arrays, "out/state_after_call0"), tolerance)
        if spec["transformer_config"]["is_train"]:
            want = under(arrays, f"out/call{call}")
            close("l_commit", metrics["loss_commit_per_token"], want["l_commit"], tolerance)
            assert want["l_codebook"] == pytest.approx(0.0, abs=1e-6)
            metrics_close(metrics, under(want, "metrics"), tolerance)
    close("logprobs", np.concatenate(log_probs, 1), arrays["out/logprobs"], tolerance)
    state_close("final_state", state, under(arrays, "out/final_state"), tolerance)


def metrics_close(got: dict, want: dict, tolerance: float = TOLERANCE) -> None:
    assert set(want) <= set(got), set(want) - set(got)
    for name, value in want.items():
        # Cosines of both signs cancel in their mean, so they are measured against 1, not against it.
        scale = 1.0 / max(abs(float(value)), 1e-30) if name.startswith("c_sim") else 1.0
        close(name, got[name], value, tolerance * max(scale, 1.0))


def check_lossgrad(spec: dict, arrays: dict) -> None:
    model = model_config(spec["transformer_config"])
    given = weights(under(arrays, "params"), model)
    batch = on_device(under(arrays, "batch"))
    state = on_device(state_from_original(under(arrays, "state_in")))

    @jax.jit
    def gradient(given, batch, state):
        return jax.value_and_grad(train_step.loss_fn, has_aux=True)(*given, batch, state, None, model)

    (loss, (state_out, stats, metrics)), grads = gradient(given, batch, state)
    log_probs, *_ = forward(given, batch["inputs"], batch["loss_mask"], state, model=model)
    close("loss", loss, arrays["out/loss"])
    close("l_lm", metrics["loss_lm_per_token_unscaled"], arrays["out/l_lm_unscaled"])
    close("l_commit", metrics["loss_commit_per_token"], arrays["out/l_commit"])
    assert arrays["out/l_codebook"] == pytest.approx(0.0, abs=1e-6)
    close("logprobs", log_probs, arrays["out/logprobs"])
    metrics_close(metrics | transformer.measure(given), under(arrays, "out/metrics"))
    state_close("attn_state", state_out, under(arrays, "out/attn_state"))

    want_grads, want_extra = original.weights(under(arrays, "out/grads"), model)
    trees_close("grads", grads, want_grads)
    n_block = batch["inputs"].shape[1] // model.block_len
    (n_device,), (n_block_per_update,) = (
        set(np.asarray(spec["vq_spec"][name]).ravel().tolist()) for name in ("n_device", "n_block_per_update")
    )
    total = jax.tree.map(lambda x: x * n_device * n_block_per_update / n_block, stats)
    new = transformer.learn(given, total, model).extra
    trees_close("extra", jax.tree.map(jnp.subtract, given.extra, new), want_extra, CANCELLING)


def optimizer_config(original: dict) -> schema.Optimizer:
    return schema.Optimizer(
        name=original["optimizer"],
        lr_max=original["lr_max"],
        schedule=original["lr_schedule"],
        n_warmup_step=original["n_warmup_step"],
        n_max_step=original["n_max_step"],
        grad_clip=original["grad_clip"] or 0.0,
        wd_lam=original["wd_lam"],
    )


def moments(opt_state: object, name: str) -> dict[str, object]:
    """Our optimizer's moments as trees of parameters, by the original's names."""
    inner = opt_state[name]
    if name == "adafactor":
        units, rest = inner["each"]["factored"], inner["rest"]["factored"]
        return {m: getattr(units, m) | getattr(rest, m) for m in ("v_row", "v_col", "v")}
    return {m: getattr(inner, m) for m in (("mu", "nu") if name == "adamw" else ("mu",))}


def opt_state_close(opt_state: object, spec: dict, arrays: dict, rename) -> None:
    index = 1 if spec["optimizer"]["grad_clip"] else 0
    want = under(arrays, f"out/opt_state/main/{index}/0")
    got = moments(opt_state, spec["optimizer"]["optimizer"])
    assert {path.split("/")[0] for path in want} == {"count", *got}
    for name, tree in got.items():
        golden = rename(under(want, name))
        if any(path.startswith(f"main/{index}/0/{name}/") for path in spec["opt_state_bfloat16"]):
            jax.tree.map(bfloat16_close, tree, golden)
        else:
            trees_close(name, tree, golden)


def bfloat16_close(got: jax.Array, want: np.ndarray) -> None:
    """Gradients equal to 1e-5 may round to neighbours in bfloat16: by a place or two in all, and rarely."""
    assert got.dtype == jnp.bfloat16
    got, want = np.asarray(got, np.float32), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=2**-6, atol=TOLERANCE * np.abs(want).max())
    assert np.mean(got != want) <= 0.01


def check_train(spec: dict, arrays: dict) -> None:
    model = model_config(spec["transformer_config"])
    B, T = arrays["batch0/inputs"].shape
    run = schema.Config(
        model=model,
        optimizer=optimizer_config(spec["optimizer"]),
        train=schema.Train(
            steps=1, global_batch_size=B, sequence_len=T, update_len=spec["transformer_config"]["update_len"]
        ),
    )
    assert [row for rows in spec["device_rows"] for row in rows] == list(range(B))
    mesh = sharding.make(run.mesh, jax.devices()[: spec["n_device"]])
    tx = optimizer.make(run.optimizer, run.model)
    given = weights(under(arrays, "params"), model)
    state = TrainState(jnp.int32(0), given, jax.jit(tx.init)(given.params), jax.random.key(0))
    state = jax.device_put(state, sharding.sharding(mesh, sharding.WHOLE))
    step = train_step.make(run, mesh, tx)
    for i in range(spec["n_train_op_steps"]):
        state, metrics = step(state, sharding.global_batch(mesh, under(arrays, f"batch{i}"), B))
        want = original.weights(under(arrays, f"out/step{i}/params"), model)
        trees_close(f"step{i}.weights", state.weights, want)
        metrics_close(metrics, under(arrays, f"out/step{i}/metrics"))
    assert int(state.step) == spec["final_train_state_step"]
    if spec["opt_state_stored"]:
        # Adafactor sees keys, values and gates as one array, as the original's does.
        joined = spec["optimizer"]["optimizer"] == "adafactor"
        rename = lambda flat: original.weights(flat, model, joined=joined)[0]
        opt_state_close(state.opt_state, spec, arrays, rename)


def check_eval(spec: dict, arrays: dict) -> None:
    model = model_config(spec["transformer_config"])
    given = weights(under(arrays, "params"), model)
    batch = under(arrays, "batch")
    B, T = batch["inputs"].shape
    mesh = sharding.make(schema.Mesh(), jax.devices()[: spec["n_device"]])
    # Pieces of one block and of all blocks: the update length plays no part in evaluation.
    empty, read = evaluate.reader(model, mesh)
    count = batch["loss_mask"].sum()
    close("loss_mask", count / (B * T), arrays["out/stats/loss_mask_per_token"])
    for piece_len in (model.block_len, T):
        state, nats = empty(B), 0.0
        for start in range(0, T, piece_len):
            piece = {name: np.asarray(x)[:, start : start + piece_len] for name, x in batch.items()}
            nats_BT, state = read(given, sharding.global_batch(mesh, piece, B), state)
            nats += np.asarray(nats_BT, np.float64).sum()
        close("loss_lm", nats / (B * T), arrays["out/stats/loss_lm_per_token_unscaled"])
        close("loss", nats / count, arrays["out/loss_lm_per_token"])


def check_decode(spec: dict, arrays: dict) -> None:
    model = model_config(spec["transformer_config"])
    given = weights(under(arrays, "params"), model)
    inputs = on_device(arrays["batch/inputs"])
    empty = transformer.start(model, inputs.shape[0])

    for name, block_len in (("block1", 1), ("blockL", model.block_len)):
        log_probs, state, _ = forward(
            given, inputs, jnp.ones_like(inputs), empty,
            model=dataclasses.replace(model, block_len=block_len),
        )  # fmt: skip
        close(name, log_probs, arrays[f"out/logprobs_{name}"])
        if under(arrays, f"out/final_state_{name}"):
            state_close(name, state, under(arrays, f"out/final_state_{name}"))

    @jax.jit
    def decode(given, inputs):
        first = transformer.begin(given, empty, model)
        step = lambda state, token_B: transformer.step(given, token_B, state, model)[::-1]
        last, log_probs = jax.lax.scan(step, first, inputs.T)
        return last, log_probs.swapaxes(0, 1)

    last, log_probs = decode(given, inputs)
    close("decode", log_probs, arrays["out/logprobs_block1"])
    want = state_from_original(under(arrays, "out/final_state_block1"))
    rings = recurrence.rings_from_state(on_device(want.units), want.position)
    # What rounding took is ours alone.
    settled = stream.settled(last.rings, last.position)
    trees_close("rings", settled._replace(lost_NBHSV=rings.lost_NBHSV), rings)


def check_sample(spec: dict, arrays: dict) -> None:
    model = model_config(spec["transformer_config"])
    given = weights(under(arrays, "params"), model)
    want = arrays["out/tokens_greedy_p0"]
    n = want.shape[0]
    tokens = draw.continuations(
        given, [draw.empty(model)] * n, range(n), jax.random.key(0),
        batch_size=n, model=model, length=want.shape[1], temperature=1.0, p_nucleus=0.0,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, want)


def made_up(flat: dict) -> dict:
    """The optimizer files' invented tree in our names."""
    names = {
        "emb/embs": "embed/table", "emb/bias_out": "embed/bias", "pe/scale": "position/scale",
        "layer/q_proj/kernel": "units/q", "layer/kvg_proj/kernel": "units/r",
        "layer/ln/g": "units/norm/gain", "layer/u": "units/u",
    }  # fmt: skip
    stack = lambda path, x: x[None] if path.startswith("units") else x
    arrays = {new: stack(new, flat[old]) for old, new in names.items()}
    return on_device(unflatten_dict(arrays, sep="/"))


def check_optim(spec: dict, arrays: dict) -> None:
    tx = optimizer.make(optimizer_config(spec["optimizer"]), schema.Model(e_tie=True, pe_abs=True))
    params = made_up(under(arrays, "params"))
    opt_state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for i in range(spec["n_step"]):
        updates, opt_state = update(made_up(under(arrays, f"in/grads{i}")), opt_state, params)
        trees_close(f"updates{i}", updates, made_up(under(arrays, f"out/updates{i}")))
        params = jax.tree.map(jnp.add, params, updates)
    trees_close("params", params, made_up(under(arrays, "out/final_params")))
    opt_state_close(opt_state, spec, arrays, made_up)


def check_schedule(spec: dict, arrays: dict) -> None:
    for name in {path.split("/")[1] for path in arrays}:
        steps = arrays[f"in/{name}/steps"]
        for kind in ("cosine", "linear"):  # its inv_sqrt is a defect of the original
            made = optimizer.schedule(
                schema.Optimizer(
                    schedule=kind,
                    **spec["settings"][name],
                )
            )
            close(f"{name}.{kind}", jax.vmap(made)(jnp.asarray(steps)), arrays[f"out/{name}/{kind}"])


def check_nucleus(spec: dict, arrays: dict) -> None:
    for name in spec["sets"]:
        logits = jnp.asarray(arrays[f"in/{name}/logits"])
        for p in spec["p_values"]:
            got = jax.jit(draw.nucleus, static_argnums=1)(logits, p)
            np.testing.assert_array_equal(got != draw.REMOVED, arrays[f"out/{name}/p{p}/keep"] == 1)
            np.testing.assert_array_equal(got, arrays[f"out/{name}/p{p}/masked_logits"])


def check_vq(spec: dict, arrays: dict) -> None:
    codebook = {"sum": jnp.asarray(arrays["in/c_sum"]), "count": jnp.asarray(arrays["in/c_count"])}
    keys, mask, weight = (jnp.asarray(arrays[f"in/{name}"]) for name in ("vecs", "loss_mask", "w"))
    c = vq.codewords(codebook)
    z = vq.nearest(keys, c)
    found = vq.lookup(z, c)
    e2 = vq.squared_error(keys, found)
    close("codebook", c, arrays["out/codebook"])
    for prefix in ("out", "out/module"):
        np.testing.assert_array_equal(z, arrays[f"{prefix}/shortcodes"])
        close("errs2", e2, arrays[f"{prefix}/errs2"])
        metrics = vq.key_metrics(keys, found, e2, keys.shape[2]) | vq.codebook_metrics(codebook)
        metrics_close(metrics, under(arrays, f"{prefix}/metrics"))
    close("codewords", found, arrays["out/codewords"])
    close("quantized", vq.straight_through(keys, found), arrays["out/module/quantized"])

    stats = vq.statistics(keys, z, mask, c.shape[1])
    times = spec["n_device"] * spec["n_block_per_update"]
    new = vq.moving_average(codebook, jax.tree.map(lambda x: x * times, stats), spec["c_gamma"])
    for name in ("sum", "count"):
        close(name, new[name], arrays[f"out/c_{name}_tgt"])
        got = codebook[name] - new[name]
        close(f"{name} gradient", got, arrays[f"out/l_codebook_grad/c_{name}"], CANCELLING)

    def commit(keys):
        return jnp.mean(jnp.sum(vq.squared_error(keys, found), 1) * mask)

    close("l_commit", commit(keys), arrays["out/module/l_commit"])
    close("grad l_commit", jax.grad(commit)(keys), arrays["out/module/grad_l_commit/vecs"])
    dot = lambda keys: jnp.sum(vq.straight_through(keys, found) * weight)
    close("grad dot", jax.grad(dot)(keys), arrays["out/module/grad_quantized_dot_w/vecs"])
    assert not arrays["out/module/grad_l_codebook/vecs"].any()


def check_misc(spec: dict, arrays: dict) -> None:
    for name, want in under(arrays, "out/sinusoid").items():
        length, width, lam = (int(name.split("_")[i].lstrip("lenwam")) for i in range(3))
        start = int(name.partition("start")[2] or 0)
        got = layers.sinusoid(jnp.arange(start, start + length), width, float(lam), jnp.float32)
        close(name, got[::-1] if name.endswith("flip") else got, want)
    x, gain, bias = (jnp.asarray(arrays[f"in/ln/{n}"]) for n in ("x", "g", "b"))
    got = layers.norm(x[None], {"gain": gain, "bias": bias})[0]
    close("ln", got, arrays["out/ln/gain_bias"])
    close("plain ln", layers.rms_norm(x), arrays["out/ln/plain"])

    model = dataclasses.replace(model_config(spec["attn_transformer_config"]), n_layer=1)
    params, extra = jax.tree.map(
        lambda x: jnp.asarray(x)[0],
        original.weights(
            {f"transformer_layers_0/scanned_attn1/{k}": v for k, v in under(arrays, "attn/params").items()},
            model,
        ),
    )
    unit, codebook = params["units"], extra["codebooks"]
    features = arrays["attn/in/features"]
    n_block, B, L, _ = features.shape
    state = jax.tree.map(lambda x: x[0], transformer.start(model, B).units)
    distance = transformer.distances(model)
    run = jax.jit(functools.partial(gated_unit, config=model))
    for i in range(n_block):
        res, state, stats = run(
            unit, codebook, jnp.asarray(features[i]), jnp.ones((B, L), jnp.int32),
            jnp.broadcast_to(distance[None], (B, *distance.shape)), state,
        )  # fmt: skip
        want = under(arrays, f"attn/out/block{i}")
        # The original's module adds the residual itself.
        close("res", res + features[i] if spec.get("res_includes_input") else res, want["res"])
        close("l_commit", stats["commit"], want["l_commit"])
        stacked = {f"0/0/{k}": v for k, v in under(want, "state").items()}
        got = transformer.State(jnp.int32((i + 1) * L), jax.tree.map(lambda x: x[None], state))
        state_close(f"block{i}", got, stacked)


CHECKS = {
    "forward": check_forward, "lossgrad": check_lossgrad, "train": check_train, "eval": check_eval,
    "decode": check_decode, "sample": check_sample, "optim": check_optim, "schedule": check_schedule,
    "nucleus": check_nucleus, "vq": check_vq, "misc": check_misc,
}  # fmt: skip


def is_slow(path: Path) -> bool:
    """Whether it is one of the training runs, but for those on one device."""
    return path.stem.startswith("train_") and not path.stem.endswith("dev1")


GOLDEN_FILES = [pytest.param(path, marks=[pytest.mark.slow] * is_slow(path)) for path in FILES]


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=[path.stem for path in FILES])
def test_golden(path: Path) -> None:
    spec, arrays = load(path)
    CHECKS[spec["group"]](spec, arrays)


def test_there_are_files() -> None:
    assert FILES, f"no golden files in {GOLDEN}"


@pytest.mark.parametrize("name", ["enwik8", "pg19", "imagenet64"])
def test_recipe_shapes(name: str) -> None:
    recipe = json.loads((GOLDEN / "recipes.json").read_text())["recipes"][name]
    model = model_config(recipe["settings"])
    ours = jax.eval_shape(lambda: parameters.init(model, jax.random.key(0)))
    unused = 0 if model.e_tie else model.n_vocab  # the bias of the embedding that nothing reads
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(ours) + unused == recipe["n_param_total"]
    assert count(ours.extra) == recipe["n_param_codebook"]
    assert original.kinds(model) == {p: f"float32{shape}" for p, shape in recipe["shapes"].items()}
    # Of the units, which are all alike, the first few: all of them take a gigabyte.
    few = dataclasses.replace(model, n_layer=2)
    bytes_of = {path: np.empty(recipe["shapes"][path], np.uint8) for path in original.kinds(few)}
    shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), tree)
    wanted = jax.eval_shape(lambda: parameters.init(few, jax.random.key(0)))
    assert shapes(original.weights(bytes_of, few)) == shapes(wanted)
    units = lambda tree: [x.shape[1:] for x in jax.tree.leaves(tree.params["units"])]
    assert units(wanted) == units(ours)


@pytest.mark.parametrize("case", ["e_tie0", "e_tie1_peabs"])
def test_initial_values(case: str) -> None:
    stats = json.loads((GOLDEN / "init_stats.json").read_text())[case]
    model = model_config({"pe_lam": 100_000} | stats["config"])
    ours = parameters.init(model, jax.random.key(0))
    joined = transforms.joined(ours.params["units"], transforms.joints(model, "units"))
    ours = ours._replace(params=ours.params | {"units": joined})
    for what in ("mean", "std"):
        flat = {path: np.float32(leaf[what]) for path, leaf in stats["leaves"].items()}
        want = original.weights(flat, model, joined=True)
        size = jax.tree.map(lambda x: x.size, ours)
        for (path, array), (_, wanted), (_, n) in zip(
            *map(jax.tree.leaves_with_path, (ours, want, size)), strict=True
        ):
            got = np.asarray(array, np.float64)
            axes = tuple(range(1, got.ndim)) if np.ndim(wanted) else None
            got = got.mean(axes) if what == "mean" else got.std(axes)
            # Five standard errors of two samples of n normal numbers.
            spread = 5 * np.sqrt(2 / n) * max(float(np.std(array)), 1e-12) + 1e-6 * np.abs(wanted)
            assert np.all(np.abs(got - wanted) <= spread), (
                f"{jax.tree_util.keystr(path)} {what}: {got} {wanted}"
            )

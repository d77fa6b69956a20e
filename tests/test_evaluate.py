"""Evaluation: every token once, whatever the batch, the devices and the pieces."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from tests.model import small
from tvq import config, evaluate, mesh
from tvq.model import transformer

MODEL = dataclasses.replace(small.MODEL, p_dropemb=0.5, p_dropsin=0.5, p_dropres=0.5, p_droplyr=0.5)
T, N_SEQUENCE = 16, 5
EMPTY = dict.fromkeys(("inputs", "targets", "doc_ids", "loss_mask"), np.zeros((1, T), np.int32))


@functools.cache
def split() -> dict[str, np.ndarray]:
    """Five sequences, the last of them padded after 7 tokens."""
    rng = np.random.default_rng(0)
    text = rng.integers(3, MODEL.n_vocab, (N_SEQUENCE, T + 1)).astype(np.int32)
    mask = np.ones((N_SEQUENCE, T), np.int32)
    mask[-1, 7:] = 0
    return {
        "inputs": text[:, :-1] * mask,
        "targets": text[:, 1:] * mask,
        "doc_ids": np.zeros_like(mask),
        "loss_mask": mask,
    }


def batches(devices: jax.sharding.Mesh, size: int, data: dict | None = None) -> list[dict[str, jax.Array]]:
    """The last is filled up with masked rows."""
    data = data or split()
    found = []
    for start in range(0, N_SEQUENCE, size):
        rows = {name: array[start : start + size] for name, array in data.items()}
        n_row = len(rows["inputs"])
        rows = {k: np.concatenate([a, np.repeat(EMPTY[k], size - n_row, 0)]) for k, a in rows.items()}
        found.append(mesh.global_batch(devices, rows, size))
    return found


@functools.cache
def compiled(n_device: int, batch_size: int, piece_len: int):
    devices = mesh.make(config.Mesh(), jax.devices()[:n_device])
    first = batches(devices, batch_size)[0]
    lowered = evaluate.make(MODEL, devices, piece_len).lower(*small.parameters(MODEL), first)
    # To compile takes longer than to run.
    return devices, lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def total(n_device: int, batch_size: int, piece_len: int = 8, data: dict | None = None) -> tuple[float, int]:
    devices, score = compiled(n_device, batch_size, piece_len)
    whole = jax.device_put(small.parameters(MODEL), mesh.sharding(devices, mesh.WHOLE))
    return evaluate.total(score, *whole, batches(devices, batch_size, data))


@functools.cache
def by_hand() -> tuple[float, int]:
    """One sequence after the other from the empty state, one token's loss after the other; no dropout."""
    data, nats, n_token = split(), 0.0, 0
    params, codebooks = small.parameters(MODEL)
    for b in range(N_SEQUENCE):
        inputs = data["inputs"][b : b + 1]
        empty = transformer.initial_state(MODEL, 1)
        log_probs = np.asarray(small.log_probs(params, codebooks, inputs, empty, small.MODEL)[0], np.float64)
        for t in range(T):
            if data["loss_mask"][b, t]:
                nats -= log_probs[0, t, data["targets"][b, t]]
                n_token += 1
    return nats, n_token


def test_every_token_counts_once():
    nats, n_token = total(1, 2)
    assert n_token == by_hand()[1] == 4 * T + 7
    # Sums of 16 float32 losses, added up in float64.
    assert nats == pytest.approx(by_hand()[0], rel=1e-6)


def test_the_result_does_not_depend_on_the_batch_size():
    for size in (4, 5):
        nats, n_token = total(1, size)
        assert n_token == by_hand()[1]
        # XLA orders the sums of a product by its shape.
        assert nats == pytest.approx(total(1, 2)[0], rel=1e-6)


def test_the_result_does_not_depend_on_the_devices():
    nats, n_token = total(4, 4)
    assert n_token == by_hand()[1]
    assert nats == pytest.approx(total(1, 4)[0], rel=1e-6)
    # With one row on each device even the order of sums is the same.
    assert total(2, 2) == total(4, 4)


@pytest.mark.parametrize("piece_len", [4, 16])
def test_the_result_does_not_depend_on_the_pieces(piece_len):
    nats, n_token = total(1, 2, piece_len)
    assert n_token == by_hand()[1]
    assert nats == pytest.approx(total(1, 2)[0], rel=1e-6)


def test_padding_does_not_matter():
    data = {name: array.copy() for name, array in split().items()}
    data["inputs"][-1, 8:] = data["targets"][-1, 7:] = 5
    assert total(1, 2, data=data) == total(1, 2)
    data["targets"][-1, 6] ^= 1
    assert total(1, 2, data=data) != total(1, 2)


def test_progress_counts_batches():
    devices, score = compiled(1, 2, 8)
    seen: list[int] = []
    evaluate.total(score, *small.parameters(MODEL), batches(devices, 2), seen.append)
    assert seen == [1, 2, 3]


def test_result():
    got = evaluate.result(nats=300.0, n_token=200, n_byte=250)
    assert got == {
        "loss": 1.5,
        "bits_per_token": pytest.approx(1.5 / math.log(2)),
        "bits_per_byte": pytest.approx(1.2 / math.log(2)),
        "n_token": 200,
        "n_byte": 250,
    }


def test_no_token():
    _, score = compiled(1, 2, 8)
    assert evaluate.total(score, *small.parameters(MODEL), []) == (0.0, 0)
    with pytest.raises(ValueError, match="no token"):
        evaluate.result(0.0, 0, 0)

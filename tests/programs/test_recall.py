"""The recall probe: made as it says, and able to tell a model that recalls from one that does not."""

import math

import numpy as np
import pytest

from tvq.programs import recall

L, M = 16, 24


def made(n_vocab: int = 40, length: int = 1024) -> recall.Probe:
    return recall.probe(4, length, n_vocab, seed=0)


@pytest.mark.parametrize("n_vocab", [20, 40, 32000])
def test_the_answer_stands_where_it_says_and_nowhere_else(n_vocab):
    probe = made(n_vocab)
    n_key = next(n for n in range(1, 20) if (n_vocab - 3) ** n >= 16 * 1024)
    assert (probe.inputs_BT[:, 0] == 1).all()
    assert (probe.inputs_BT[:, 1:] >= 3).all()
    np.testing.assert_array_equal(probe.inputs_BT[:, 1:], probe.targets_BT[:, :-1])
    for inputs, targets, distance in zip(*probe, strict=True):
        for i in np.flatnonzero(distance):
            key, answer = inputs[i - n_key + 1 : i + 1], i - distance[i]
            assert targets[i] == inputs[answer]
            starts = [t for t in range(1, i + 1, n_key + 1) if (inputs[t : t + n_key] == key).all()]
            assert starts == [answer - n_key, i - n_key + 1]
    asked = probe.distance_BT[probe.distance_BT > 0]
    assert np.bincount(np.frexp(asked)[1], minlength=10)[4:10].min() > 3, (
        "some distances are hardly asked for"
    )


def test_a_probe_is_a_function_of_its_seed():
    first = made()
    np.testing.assert_array_equal(made().inputs_BT, first.inputs_BT)
    assert (recall.probe(4, 1024, 40, seed=1).inputs_BT != first.inputs_BT).mean() > 0.9


def test_too_short():
    with pytest.raises(ValueError, match=r"recall.length 8 holds 2 slots of 3 tokens; use 24 or more"):
        recall.probe(1, 8, 40, seed=0)
    with pytest.raises(ValueError, match=r"config.model.n_vocab 4 leaves 1 ids"):
        recall.probe(1, 8, 4, seed=0)


def test_it_tells_who_recalls_how_far():
    """Of a model that sees only its window, one that sees everything, and one that guesses."""
    probe = made()
    window = recall.in_window(probe.distance_BT, L, M)
    # By hand: the window of query i begins M before its block.
    for i in (0, 15, 16, 100):
        assert all(
            recall.in_window(np.full((1, 200), i - j), L, M)[0, i] == (j >= i // L * L - M) for j in range(i)
        )
    chance = math.log(37)
    knows = {"window": window, "all": window | True, "nothing": window & False}
    tables = {
        who: recall.answers(np.where(known, 0.1, chance), probe.distance_BT, window)
        for who, known in knows.items()
    }
    both = {who: [row["recalled"] for row in table[:2]] for who, table in tables.items()}
    assert both == {"window": [1.0, 0.0], "all": [1.0, 1.0], "nothing": [0.0, 0.0]}
    assert [row["where"] for row in tables["all"][:2]] == ["window", "cache"]
    near, far = tables["window"][2], tables["window"][-1]
    assert (near["to"], near["loss"], near["recalled"]) == (3, pytest.approx(0.1), 1.0)
    assert (far["from"], far["loss"], far["recalled"]) == (512, pytest.approx(chance), 0.0)
    assert sum(row["n_question"] for row in tables["all"][2:]) == (probe.distance_BT > 0).sum()
    assert recall.show(tables["window"], chance).splitlines()[1].split()[:3] == ["window", "100.0", "%"]

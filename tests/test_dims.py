import numpy as np
import pytest

from tvq import dims


def test_sizes_of_all_letters():
    assert dims.check(q_BHLK=np.zeros((2, 1, 4, 8)), c_HSK=np.zeros((1, 5, 8))) == {
        "B": 2, "H": 1, "L": 4, "K": 8, "S": 5,
    }  # fmt: skip


def test_scalar_and_names_with_underscores():
    assert dims.check(total_=np.zeros(()), running_sum_S=np.zeros(3)) == {"S": 3}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a_BT": np.zeros((2, 3)), "b_BT": np.zeros((2, 4))}, "b_BT: T is 4 here and 3 before"),
        ({"a_BB": np.zeros((2, 3))}, "a_BB: B is 3 here and 2 before"),
        ({"a_BTD": np.zeros((2, 3))}, "a_BTD: 3 letters, shape (2, 3)"),
        ({"a_BZ": np.zeros((2, 3))}, "a_BZ: letters outside the alphabet"),
        ({"mask": np.zeros(3)}, "mask: letters outside the alphabet"),
    ],
)
def test_what_does_not_fit_is_named(tensors, message):
    with pytest.raises(AssertionError) as error:
        dims.check(**tensors)
    assert message in str(error.value)


def test_the_legend_gives_every_letter():
    table = [line for line in dims.__doc__.splitlines() if line.startswith("    ")]
    letters = [word for line in table for word in line.replace(",", " ").split() if len(word) == 1]
    assert set(letters) - {"+", "1"} == dims.ALPHABET

import numpy as np
import pytest

from tvq.data.vocabulary import END, PAD, UNKNOWN, ByteVocabulary


def test_special_ids():
    assert (PAD, END, UNKNOWN) == (0, 1, 2)


def test_byte_b_is_id_b_plus_three():
    text = bytes(range(256))
    ids = ByteVocabulary().encode(text)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, np.arange(3, 259))
    assert ByteVocabulary().size == 259
    assert ByteVocabulary().decode(ids) == text


def test_special_ids_decode_to_nothing():
    assert ByteVocabulary().decode(np.array([1, 107, 0, 108, 2], np.int32)) == b"hi"


@pytest.mark.parametrize("strange", [-1, 259])
def test_ids_outside_do_not_decode(strange):
    with pytest.raises(ValueError, match=f"id {strange} is outside .* 259 ids"):
        ByteVocabulary().decode(np.array([5, strange]))

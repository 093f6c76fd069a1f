"""Model families as their libraries build them: right where covered, and the rest is named."""

import families
import pytest

import gnsmon.checking

# Families of which less than 99 % is covered, with the share that is.
PARTLY = {
    "DeBERTa": 0.88,  # position embeddings without a batch axis go through shared projections
    "Wav2Vec2": 0.95,  # one convolution has its weight normalised
    "Mamba": 0.94,  # a convolution's weight and the state matrix, used outside any layer
}


@pytest.mark.parametrize("name", families.families())
def test_a_family_is_right_where_it_is_covered(name):
    if name in families.HUGGING_FACE:
        pytest.importorskip("transformers")
    check = families.check(name)
    assert check.max_error < gnsmon.checking.TOLERANCE
    assert check.fraction >= PARTLY.get(name, 0.99)
    assert all(row.reason for row in check.rows if row.error is None)


def test_the_families_that_are_wholly_covered_are_many():
    assert len(families.HUGGING_FACE) + len(families.PLAIN) - len(PARTLY) >= 25

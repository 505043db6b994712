import pytest

from sarm.engine.passes import _advice


@pytest.mark.parametrize(
    ("rejected", "said"),
    [
        ({"overflow": 40, "empty": 2}, "Pass --extraction.dtype bfloat16"),
        ({"not_finite": 3}, "Pass --model.dtype float32"),
        ({"empty": 40, "overflow": 2}, "Look at the source"),
        ({}, "Look at the source"),
    ],
)
def test_where_no_row_is_left_the_commonest_reason_decides_what_to_do(rejected, said):
    assert said in _advice(rejected)

"""The two kernels that compare layouts of a state, in Triton's interpreter, with every tile."""

import pytest

from benchmarks import layout
from benchmarks.rows import Heads, Row


@pytest.mark.parametrize("v_major", [True, False], ids=["V-major", "K-major"])
@pytest.mark.parametrize("row", [Row("layout", 2, 1, "bf16"), Row("layout_scan", 2, 128)], ids=str)
def test_both_layouts_agree_with_the_loop_over_tokens(row, v_major):
    layout.check(v_major, row, Heads(1, 2, 16, 128), "cpu")

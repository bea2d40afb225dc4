"""Refusals that only data can tell, the checks of ``GDN_DEBUG=1``, and gradients not served."""

import pytest
import torch
from inputs import cu_seqlens, indices, make_convolution, make_inputs, make_state

import gdn_ops

pytestmark = pytest.mark.usefixtures("form")

H, HV, K, V, D, W = 2, 4, 8, 6, 12, 4
SLOTS = 7
OPERATORS = ("chunk", "recurrent", "chunk_", "recurrent_", "causal_conv1d", "causal_conv1d_")
IN_PLACE = ("chunk_", "recurrent_", "causal_conv1d_")


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("GDN_DEBUG", "1")


def _arguments(op, B=2, T=3, **options):
    if op.startswith("causal_conv1d"):
        arguments = dict(zip(("x", "weight", "bias"), make_convolution(B, T, D, W), strict=True))
        pool = torch.ones(SLOTS, D, W - 1 + 2)
    else:
        arguments = make_inputs(B, T, H, HV, K, V)._asdict()
        pool = make_state(SLOTS, HV, V, K)
    if op.endswith("_"):
        arguments |= {"state": pool, "state_indices": indices([4, 2])}
    return arguments | options


def _assert_refused(op, arguments, message, error=ValueError):
    """The call raises exactly this, and every tensor of it is what it was."""
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error) as raised:
        getattr(gdn_ops, op)(**arguments)
    assert str(raised.value) == message
    for name, x in before.items():
        assert torch.equal(arguments[name], x), name


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_a_slot_outside_the_pool_is_refused_before_any_row_is_computed(op, index_dtype):
    arguments = _arguments(op, state_indices=indices([4, SLOTS], index_dtype))
    message = f"{op}: state_indices must be less than the pool's 7 slots, got 7 in row 1"
    _assert_refused(op, arguments, message)


@pytest.mark.parametrize("op", ["chunk_", "recurrent_"])
def test_a_slot_outside_the_pool_is_refused_where_it_is_only_read(op):
    arguments = _arguments(op, read_indices=indices([99, 1]))
    message = f"{op}: read_indices must be less than the pool's 7 slots, got 99 in row 0"
    _assert_refused(op, arguments, message)


def test_a_slot_outside_the_pool_is_refused_in_every_column_that_is_written():
    table = indices([[0, 1, 2], [3, 4, 7]])
    message = "recurrent_: state_indices must be less than the pool's 7 slots, got 7 in row 1"
    _assert_refused("recurrent_", _arguments("recurrent_", state_indices=table), message)
    # Two tokens write two columns; the third is neither read nor written.
    gdn_ops.recurrent_(**_arguments("recurrent_", T=2, state_indices=table))


@pytest.mark.parametrize("op", IN_PLACE)
def test_a_padding_or_empty_row_may_name_any_slot(op, debug):
    """Nobody looks at what a row that does nothing names."""
    arguments = _arguments(op, B=1, state_indices=indices([99, 2, 2]))
    gdn_ops.__dict__[op](**arguments | {"cu_seqlens": cu_seqlens([0, 3, 0])})
    arguments = _arguments(op, B=3, state_indices=indices([-1, 2, -1]))
    gdn_ops.__dict__[op](**arguments)


@pytest.mark.parametrize("op", IN_PLACE)
def test_debug_names_the_rows_that_write_one_slot(op, debug):
    arguments = _arguments(op, B=4, state_indices=indices([5, 1, -1, 5]))
    message = (
        f"{op}: state_indices must name a slot in one live row only, got slot 5 in rows 0 and 3"
    )
    _assert_refused(op, arguments, message)


@pytest.mark.parametrize("op", ["chunk_", "recurrent_"])
def test_debug_names_the_rows_that_write_and_read_one_slot(op, debug):
    slots, read = indices([5, 1, 0]), indices([5, 6, 1])
    arguments = _arguments(op, B=3, state_indices=slots, read_indices=read)
    message = (
        f"{op}: state_indices must not name a slot that another live row reads, "
        "got slot 1, read by row 2 and written by row 1"
    )
    _assert_refused(op, arguments, message)


@pytest.mark.parametrize("op", ["chunk_", "recurrent_"])
def test_debug_lets_rows_read_one_slot_that_none_writes(op, debug):
    slots, read = indices([5, 1, 0]), indices([6, 6, 0])
    getattr(gdn_ops, op)(**_arguments(op, B=3, state_indices=slots, read_indices=read))


def test_debug_looks_at_every_entry_of_a_table(debug):
    table = indices([[0, 1, 2], [3, 1, 4]])
    message = (
        "recurrent_: state_indices must name a slot in one live row only, "
        "got slot 1 in rows 0 and 1"
    )
    _assert_refused("recurrent_", _arguments("recurrent_", state_indices=table), message)
    # What a row reads counts too: the second starts from the third entry of the table.
    table, accepted = indices([[0, 1, 2], [3, 4, 1]]), indices([1, 3])
    arguments = _arguments("recurrent_", T=2)
    arguments |= {"state_indices": table, "num_accepted_tokens": accepted}
    message = (
        "recurrent_: state_indices must not name a slot that another live row reads, "
        "got slot 1, read by row 1 and written by row 0"
    )
    _assert_refused("recurrent_", arguments, message)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(
    ("bounds", "sentence"),
    [
        ([1, 2, 3], "must start at 0, got 1"),
        ([0, 3, 2], "must not decrease, got 3 then 2 in row 1"),
        ([0, 2, 4], "must end at most at T = 3, got 4"),
    ],
)
def test_debug_checks_the_bounds(op, bounds, sentence, debug):
    arguments = _arguments(op, B=1, cu_seqlens=torch.tensor(bounds))
    _assert_refused(op, arguments, f"{op}: cu_seqlens {sentence}")


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("value", ["", "0"])
def test_without_debug_no_row_is_compared_with_another(op, value, monkeypatch):
    monkeypatch.setenv("GDN_DEBUG", value)
    getattr(gdn_ops, op)(**_arguments(op, state_indices=indices([5, 5])))


@pytest.mark.parametrize("op", OPERATORS)
def test_debug_lets_a_right_call_pass_and_changes_no_result(op, debug, monkeypatch):
    bounds = cu_seqlens([1, 2])
    results = []
    for value in ("1", "0"):
        monkeypatch.setenv("GDN_DEBUG", value)
        results.append(getattr(gdn_ops, op)(**_arguments(op, B=1, cu_seqlens=bounds)))
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("op", ["chunk", "recurrent", "chunk_", "recurrent_"])
def test_keys_wider_than_256_are_not_served(op):
    q, k, v, g, beta = make_inputs(1, 2, 1, 1, 257, 4)
    arguments = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    if op.endswith("_"):
        arguments |= {"state": make_state(1, 1, 4, 257), "state_indices": None}
    _assert_refused(op, arguments, f"{op}: K must be at most 256, got 257", NotImplementedError)


@pytest.mark.parametrize("op", IN_PLACE)
def test_an_update_in_place_refuses_a_gradient_instead_of_cutting_it(op):
    message = (
        f"{op}: an operator that updates its state in place has no gradient; "
        f"use gdn_ops.{op.removesuffix('_')}, or call it under torch.no_grad()"
    )
    right = _arguments(op)
    for name in ("x", "weight", "bias", "q", "k", "v", "g", "beta", "state"):
        if name in right:
            arguments = right | {name: right[name].clone().requires_grad_()}
            _assert_refused(op, arguments, message, NotImplementedError)
            with torch.no_grad():
                assert not getattr(gdn_ops, op)(**arguments).requires_grad

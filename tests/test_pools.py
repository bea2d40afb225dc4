"""``chunk_`` and ``recurrent_`` on a pool: slots, strides, padding, nothing written elsewhere."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from inputs import cu_seqlens, generator, indices, make_inputs, make_state, spread
from tolerance import (
    assert_as_accurate_as_plain,
    assert_bitwise_equal,
    operands_of,
    witnesses,
)

import gdn_ops

pytestmark = pytest.mark.usefixtures("form")

H, HV, K, V = 2, 4, 16, 24
SLOTS = 7
LENGTHS = (3, 0, 40, 1, 66)

in_place = pytest.mark.parametrize(
    ("operator", "functional"),
    [(gdn_ops.chunk_, gdn_ops.chunk), (gdn_ops.recurrent_, gdn_ops.recurrent)],
    ids=["chunk_", "recurrent_"],
)
operators = pytest.mark.parametrize(
    "operator", [gdn_ops.chunk_, gdn_ops.recurrent_], ids=["chunk_", "recurrent_"]
)
index_dtypes = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)


def _inputs(B, T, device, **options):
    return make_inputs(B, T, H, HV, K, V, device=device, **options)


def _pool(device, dtype=torch.float32, slots=SLOTS):
    return make_state(slots, HV, V, K, dtype, device=device)


def _assert_updates_like_oracle(operator, tokens, pool, slots, **options):
    """Outputs and the whole pool: what is not written must be the same bits."""
    operands = operands_of(operator, tokens.q.dtype)
    exact, plain = witnesses(
        oracle.delta_rule_into_pool, *tokens, pool, slots, **options, operands=operands
    )
    before = pool.clone()
    o = operator(*tokens, pool, slots, **options)
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=K, name="pool")
    untouched = (exact[1] == before.cpu().double()).flatten(1).all(1)
    assert_bitwise_equal(pool[untouched], before[untouched], "untouched slots")
    return o, untouched


@in_place
@pytest.mark.parametrize("kda", [False, True], ids=["", "kda"])
@index_dtypes
def test_a_pool_equals_the_functional_form(operator, functional, index_dtype, kda, device):
    tokens, pool = _inputs(3, 35, device, kda=kda), _pool(device)
    slots = indices([5, 0, 3], index_dtype, device)
    expected_o, final = functional(*tokens, pool[slots])
    expected = pool.index_copy(0, slots.long(), final)
    o = operator(*tokens, pool, slots)
    assert_bitwise_equal(o, expected_o, "o")
    assert_bitwise_equal(pool, expected, "pool")


@operators
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_is_rounded_once_when_it_is_stored(operator, dtype, state_dtype, device):
    tokens = _inputs(1, sum(LENGTHS), device, dtype=dtype)
    slots = indices([6, 1, 0, 4, 2], device=device)
    bounds = cu_seqlens(LENGTHS, device=device)
    pool = _pool(device, state_dtype)
    _, untouched = _assert_updates_like_oracle(operator, tokens, pool, slots, cu_seqlens=bounds)
    # Slot 1 is that of the empty sequence, slots 3 and 5 are those of none.
    assert untouched.tolist() == [False, True, False, True, False, True, False]


@operators
@pytest.mark.parametrize("slots", [None, [4, 2], [0, 1]], ids=["None", "scattered", "first"])
@pytest.mark.parametrize(
    "gaps", [(0, 0, 0), (12, 0, 5), (0, 8, 0), (31, 3, 2)], ids=lambda g: "-".join(map(str, g))
)
def test_slots_and_heads_may_lie_anywhere(operator, gaps, slots, device):
    tokens = _inputs(2, 35, device)
    values = _pool(device, slots=5)
    slots = None if slots is None else indices(slots, device=device)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *tokens, values, slots)
    pool, buffer = spread(values, *gaps)
    is_gap = torch.ones_like(buffer, dtype=torch.bool)
    is_gap.as_strided(pool.shape, pool.stride(), pool.storage_offset()).fill_(False)
    o = operator(*tokens, pool, slots)
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=K, name="pool")
    assert (buffer[is_gap] == -7777.0).all()


@operators
def test_a_pool_may_be_a_layer_of_a_larger_one(operator, device):
    """Heads and slots in another order in memory, as a page of all layers has them."""
    tokens = _inputs(2, 9, device)
    values = _pool(device)
    pages = torch.full((HV, SLOTS, 3, V, K), torch.nan, device=device)
    pool = pages[:, :, 1].transpose(0, 1)
    pool.copy_(values)
    slots = indices([4, 2], device=device)
    expected_o = operator(*tokens, values, slots)
    assert_bitwise_equal(operator(*tokens, pool, slots), expected_o, "o")
    assert_bitwise_equal(pool, values, "pool")
    assert pages[:, :, [0, 2]].isnan().all()


@operators
@index_dtypes
@pytest.mark.parametrize(
    ("null_index", "slots"),
    [(-1, [-1, 3, -1, 0]), (-1, [-5, 3, -1, 0]), (0, [0, 3, -1, 1]), (2, [2, 3, 1, 4])],
)
def test_padding_rows_are_zero_and_touch_no_state(operator, slots, null_index, index_dtype, device):
    """Rows 0 and 2 are padding; their tokens are NaN, so whoever computes with them is seen."""
    tokens, pool = _inputs(4, 9, device), _pool(device)
    before = pool.clone()
    for x in tokens:
        x[[0, 2]] = torch.nan
    o = operator(*tokens, pool, indices(slots, index_dtype, device), null_index=null_index)
    live = torch.tensor([1, 3], device=device)
    alone = before.clone()
    live_slots = indices([slots[1], slots[3]], device=device)
    expected_o = operator(*tokens.rows(live), alone, live_slots)
    assert_bitwise_equal(o[live], expected_o, "o")
    assert_bitwise_equal(o[[0, 2]], torch.zeros_like(o[[0, 2]]), "o of padding")
    assert_bitwise_equal(pool, alone, "pool")


@operators
def test_a_call_of_padding_rows_alone_does_nothing(operator, device):
    tokens, pool = _inputs(2, 3, device), _pool(device)
    before = pool.clone()
    o = operator(*tokens, pool, indices([-1, -1], device=device))
    assert_bitwise_equal(o, torch.zeros_like(o))
    assert_bitwise_equal(pool, before)


@operators
def test_tokens_past_the_last_sequence_are_zero_and_never_read(operator, device):
    tokens, pool = _inputs(1, 12, device), _pool(device)
    expected_pool = pool.clone()
    slots, bounds = indices([5, 2], device=device), cu_seqlens([3, 4], device=device)
    expected = operator(
        *tokens.rows(slice(None), slice(7)), expected_pool, slots, cu_seqlens=bounds
    )
    for x in tokens:
        x[:, 7:] = torch.nan
    o = operator(*tokens, pool, slots, cu_seqlens=bounds)
    assert_bitwise_equal(o[:, :7], expected)
    assert_bitwise_equal(o[:, 7:], torch.zeros_like(o[:, 7:]))
    assert_bitwise_equal(pool, expected_pool)


@operators
def test_an_empty_sequence_leaves_its_slot_as_it_is(operator, device):
    """Bit for bit, even a NaN with a payload, which no arithmetic would keep."""
    tokens, pool = _inputs(1, 4, device), _pool(device)
    pool[3].view(torch.int32).fill_(0x7FC12345)
    before = pool.clone()
    slots, bounds = indices([3, 1, 6], device=device), cu_seqlens([0, 4, 0], device=device)
    operator(*tokens, pool, slots, cu_seqlens=bounds)
    assert_bitwise_equal(pool[[3, 6]], before[[3, 6]])
    assert not torch.equal(pool[1], before[1])


@in_place
def test_read_indices_copy_on_write(operator, functional, device):
    """A prefix is read by two rows, stays as it is, and each writes a slot of its own."""
    tokens, pool = _inputs(3, 35, device), _pool(device)
    before = pool.clone()
    read = indices([6, 6, 2], device=device)
    write = indices([0, 3, 2], device=device)
    expected_o, final = functional(*tokens, before[read])
    o = operator(*tokens, pool, write, read_indices=read)
    assert_bitwise_equal(o, expected_o, "o")
    assert_bitwise_equal(pool, before.index_copy(0, write.long(), final), "pool")


@operators
def test_a_row_that_reads_no_slot_is_padding(operator, device):
    tokens, pool = _inputs(2, 5, device), _pool(device)
    options = {"read_indices": indices([-1, 2], device=device)}
    o, untouched = _assert_updates_like_oracle(
        operator, tokens, pool, indices([0, 1], device=device), **options
    )
    assert not o[0].any()
    assert untouched.tolist() == [True, False, True, True, True, True, True]


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_without_initial_state_starts_from_zero_whatever_its_slot_holds(state_dtype, device):
    tokens, pool = _inputs(4, 35, device), _pool(device, state_dtype)
    before = pool.clone()
    pool[[5, 6]] = torch.nan
    has = torch.tensor([True, False, True, False], device=device)
    slots = indices([4, 5, 0, 6], device=device)
    o = gdn_ops.chunk_(*tokens, pool, slots, has)
    zeroed = before.clone()
    zeroed[[5, 6]] = 0
    expected_o = gdn_ops.chunk_(*tokens, zeroed, slots)
    assert_bitwise_equal(o, expected_o, "o")
    assert_bitwise_equal(pool, zeroed, "pool")


def test_an_empty_sequence_without_initial_state_leaves_its_slot_too(device):
    tokens, pool = _inputs(1, 4, device), _pool(device)
    before = pool.clone()
    has = torch.zeros(2, dtype=torch.bool, device=device)
    bounds = cu_seqlens([0, 4], device=device)
    gdn_ops.chunk_(*tokens, pool, indices([3, 1], device=device), has, bounds)
    assert_bitwise_equal(pool[3], before[3])


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_pool_is_modified_and_the_output_is_new(operator, dtype, device):
    tokens, pool = _inputs(2, 9, device), _pool(device, dtype)
    slots = indices([1, 4], device=device)
    read = indices([2, 4], device=device)
    before = [x.clone() for x in (*tokens, slots, read)]
    o = operator(*tokens, pool, slots, read_indices=read, use_qk_l2norm=True, scale=0.5)
    for x, y in zip((*tokens, slots, read), before, strict=True):
        assert torch.equal(x, y)
    assert o.is_contiguous()
    assert o.dtype == tokens.v.dtype
    given = {x.untyped_storage().data_ptr() for x in (*tokens, pool)}
    assert o.untyped_storage().data_ptr() not in given


@operators
def test_prefill_then_decode_equals_one_call(operator, device):
    """What prefill leaves in a slot is where decode goes on."""
    tokens, pool = _inputs(2, 40, device), _pool(device)
    slots = indices([5, 1], device=device)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *tokens, pool, slots)
    outputs = [operator(*tokens.rows(slice(None), slice(36)), pool, slots)]
    for t in range(36, 40):
        one = tokens.rows(slice(None), slice(t, t + 1))
        outputs.append(gdn_ops.recurrent_(*one, pool, slots))
    o = torch.cat(outputs, 1)
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=K, name="pool")


@operators
@hypothesis.given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    null_index=st.sampled_from([-1, 0]),
    given_reads=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_mix_of_rows_equals_the_oracle(operator, lengths, null_index, given_reads, seed):
    """Live, empty and padding rows; a row may read a slot that no other row writes."""
    source = generator(seed)
    N, slots = len(lengths), 9
    write = torch.randperm(slots, generator=source)[:N]
    write[torch.rand(N, generator=source) < 0.25] = -1
    tokens = make_inputs(1, max(1, sum(lengths)), 1, 2, 8, 4, seed=seed)
    options = {"null_index": null_index, "cu_seqlens": cu_seqlens(lengths)}
    if given_reads:
        free = torch.tensor([-1, *sorted(set(range(slots)) - set(write.tolist()))])
        read = free[torch.randint(len(free), (N,), generator=source)]
        own = torch.rand(N, generator=source) < 0.3
        options["read_indices"] = torch.where(own, write, read)
    pool = make_state(slots, 2, 4, 8, seed=seed)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *tokens, pool, write, **options)
    o = operator(*tokens, pool, write, **options)
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=8, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=8, name="pool")

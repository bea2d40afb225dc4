"""``recurrent_`` with a table of slots: multi-token verify, rollback, and rows of every kind."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from inputs import cu_seqlens, generator, indices, make_inputs, make_state
from tolerance import (
    assert_all_as_accurate_as_plain,
    assert_as_accurate_as_plain,
    assert_bitwise_equal,
    witnesses,
)

from gdn_ops import recurrent_

pytestmark = pytest.mark.usefixtures("form")

H, HV, K, V = 2, 4, 16, 24


def _inputs(B, T, device="cpu", **options):
    return make_inputs(B, T, H, HV, K, V, device=device, **options)


def _pool(slots, device="cpu", dtype=torch.float32):
    return make_state(slots, HV, V, K, dtype, device=device)


def _assert_updates_like_oracle(tokens, pool, table, accepted=None, bounds=None, **options):
    """Outputs and the whole pool; returns the outputs and which slots kept their bits."""
    args = (*tokens, pool, table, accepted, bounds)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *args, **options)
    before = pool.clone()
    o = recurrent_(*args, **options)
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=K, name="pool")
    untouched = (exact[1] == before.cpu().double()).flatten(1).all(1)
    assert_bitwise_equal(pool[untouched], before[untouched], "untouched slots")
    return o, untouched.tolist()


@pytest.mark.parametrize("kda", [False, True], ids=["", "kda"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_is_as_accurate_as_the_plain_loop(dtype, state_dtype, index_dtype, kda, device):
    tokens, pool = _inputs(3, 4, device, dtype=dtype, kda=kda), _pool(13, device, state_dtype)
    table = indices([[3, 1, 4, 9], [5, 0, 2, 6], [7, 8, 10, 11]], index_dtype, device)
    accepted = indices([1, 4, 2], index_dtype, device)
    _, untouched = _assert_updates_like_oracle(tokens, pool, table, accepted)
    assert untouched == [False] * 12 + [True]


def test_decode_verify_empty_and_padding_rows_share_one_launch(device):
    """Rows of 1, 4, 0, 2 and 3 tokens; the last is padding, and then come tokens of no row."""
    tokens, pool = _inputs(1, 12, device), _pool(20, device)
    table = indices([[4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3] for n in range(5)], device=device)
    table[4] = -1
    accepted = indices([3, 1, 2, 4, 1], device=device)
    bounds = cu_seqlens([1, 4, 0, 2, 3], device=device)
    for x in tokens:
        x[:, 7:] = torch.nan
    args = (*tokens, pool, table, accepted, bounds)
    before = pool.clone()
    live = tokens.map(lambda x: torch.nan_to_num(x))
    exact, plain = witnesses(oracle.delta_rule_into_pool, *live, pool, *args[6:])
    o = recurrent_(*args)
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=K, name="pool")
    assert_bitwise_equal(o[:, 7:], torch.zeros_like(o[:, 7:]), "o of padding")
    kept = torch.ones(20, dtype=torch.bool, device=device)
    kept[[0, 4, 5, 6, 7, 12, 13]] = False  # a slot for each token that came in
    assert_bitwise_equal(pool[kept], before[kept], "untouched slots")


@pytest.mark.parametrize("accepted", [-3, 0, 4, 100])
def test_an_accepted_count_outside_1_to_S_makes_the_row_padding(accepted, device):
    tokens, pool = _inputs(2, 3, device), _pool(6, device)
    table = indices([[0, 1, 2], [3, 4, 5]], device=device)
    o, untouched = _assert_updates_like_oracle(
        tokens, pool, table, indices([accepted, 3], device=device)
    )
    assert not o[0].any()
    assert untouched == [True, True, True, False, False, False]


def test_more_tokens_than_slots_make_the_row_padding(device):
    tokens, pool = _inputs(1, 5, device), _pool(4, device)
    table = indices([[0, 1], [2, 3]], device=device)
    bounds = cu_seqlens([3, 2], device=device)
    o, untouched = _assert_updates_like_oracle(tokens, pool, table, None, bounds)
    assert not o[:, :3].any()
    assert untouched == [True, True, False, False]


@pytest.mark.parametrize(("null_index", "null"), [(-1, -1), (-1, -7), (0, 0), (2, 1)])
def test_a_null_entry_of_a_live_row_is_not_written_and_as_the_read_entry_is_padding(
    null_index, null, device
):
    tokens, pool = _inputs(2, 3, device), _pool(9, device)
    table = indices([[3, null, 4], [5, null, 6]], device=device)
    accepted = indices([1, 2], device=device)
    o, untouched = _assert_updates_like_oracle(tokens, pool, table, accepted, null_index=null_index)
    assert o[0].any(dim=-1).all()
    assert not o[1].any()
    assert [n for n in range(9) if not untouched[n]] == [3, 4]


def test_a_table_without_counts_accepts_one(device):
    tokens, pool = _inputs(2, 3, device), _pool(6, device)
    table = indices([[0, 1, 2], [3, 4, 5]], device=device)
    other = pool.clone()
    o = recurrent_(*tokens, pool, table)
    other_o = recurrent_(*tokens, other, table, indices([1, 1], device=device))
    assert_bitwise_equal(o, other_o, "o")
    assert_bitwise_equal(pool, other, "pool")


def test_a_table_with_read_indices_reads_there(device):
    tokens, pool = _inputs(2, 2, device), _pool(7, device)
    table = indices([[0, 1], [2, 3]], device=device)
    options = {"read_indices": indices([6, 2], device=device)}
    _, untouched = _assert_updates_like_oracle(tokens, pool, table, **options)
    assert untouched == [False] * 4 + [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_column_holds_the_state_after_its_token(dtype, device):
    """The state is carried in float32, not read back from the slot that was rounded."""
    tokens, pool = _inputs(2, 4, device), _pool(8, device, dtype)
    table = indices([[0, 1, 2, 3], [4, 5, 6, 7]], device=device)
    first = pool[table[:, 0]]
    o = recurrent_(*tokens, pool, table)
    for t in range(4):
        part = tokens.rows(slice(None), slice(t + 1))
        exact, plain = witnesses(oracle.delta_rule, *part, first)
        actual = (o[:, : t + 1], pool[table[:, t]])
        assert_all_as_accurate_as_plain(actual, exact, plain, terms=K)


def test_the_slot_that_is_read_may_be_the_one_that_is_written(device):
    """Whatever count was accepted: the read comes before every write of the row."""
    S = 3
    for accepted in range(1, S + 1):
        tokens, pool = _inputs(1, S, device), _pool(S, device)
        table = indices([[2, 0, 1]], device=device)
        _assert_updates_like_oracle(tokens, pool, table, indices([accepted], device=device))


def _token(tokens, row, t):
    return tokens.rows(slice(row, row + 1), slice(t, t + 1))


@hypothesis.given(data=st.data(), rows=st.integers(1, 3), S=st.integers(1, 4))
def test_a_verify_loop_equals_decoding_the_accepted_tokens_bit_for_bit(data, rows, S):
    """Drafts are verified and some rejected; what was accepted is as if decoded one by one.

    Each step a row verifies ``L`` tokens: the next true ones, wrong ones after those that will be
    accepted. Rows of one step verify different numbers of tokens; a row may sit a step out.
    """
    steps = data.draw(st.integers(1, 5))
    true, wrong = _inputs(rows, steps * S, seed=1), _inputs(rows, steps * S, seed=2)
    pool = _pool(rows * S)
    table = torch.randperm(rows * S, generator=generator(S)).view(rows, S)
    plain_pool = pool[table[:, 0]].clone()
    done, accepted = [0] * rows, [1] * rows
    kept = [[] for _ in range(rows)]
    for _ in range(steps):
        lengths = [data.draw(st.integers(0, S)) for _ in range(rows)]
        now = [data.draw(st.integers(1, L)) if L else 0 for L in lengths]
        parts = [
            piece.rows(slice(row, row + 1), slice(done[row] + a, done[row] + b))
            for row in range(rows)
            for piece, a, b in ((true, 0, now[row]), (wrong, now[row], lengths[row]))
        ]
        if sum(lengths) == 0:
            continue
        packed = type(true)(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))
        bounds = cu_seqlens(lengths)
        o = recurrent_(*packed, pool, table, indices(accepted), bounds)
        for row in range(rows):
            start = int(bounds[row])
            kept[row].append(o[:, start : start + now[row]])
            done[row] += now[row]
            accepted[row] = now[row] or accepted[row]
    for row in range(rows):
        slot = indices([row])
        plain = [recurrent_(*_token(true, row, t), plain_pool, slot) for t in range(done[row])]
        if plain:
            assert_bitwise_equal(torch.cat(kept[row], 1), torch.cat(plain, 1), f"o of row {row}")
            last = table[row, accepted[row] - 1]
            assert_bitwise_equal(pool[last], plain_pool[row], f"state of row {row}")

"""No two roles of a prefill in one kernel touch the same memory unless a barrier orders them."""

import pytest

pytest.importorskip("triton")

from protocol import ANY, Kernel, named, noted, without

from gdn_ops.kernels.chunk_hopper import has_gluon

if not has_gluon():
    pytest.skip("needs the Gluon of a Triton that is known", allow_module_level=True)

WALKS, INVERT, LOAD = ("low", "high"), "invert", "load"
COUNTS = {"full": 2, "free": 2, "full_u": 2, "full_m": 1, "free_m": 1}
KERNEL = Kernel(COUNTS, {"q": 16, "k": 16, "v": 8}, {LOAD})


def _trace(role, chunks, has_norms, monkeypatch):
    """What a role does, in order."""
    from gdn_ops.kernels import chunk_fused_hopper, chunk_fused_inverse, chunk_fused_walk

    modules = (chunk_fused_hopper, chunk_fused_inverse, chunk_fused_walk)
    of_registers = {
        **dict.fromkeys(("diagonal_blocks", "beside_each_other", "column"), lambda *_: ANY),
        **dict.fromkeys(("split_operand", "round_operand"), lambda _: (ANY, ANY)),
        "load_gates": lambda *_: (ANY, ANY),
    }
    with noted(modules, monkeypatch, **of_registers) as trace:
        tiles, factors, gates, bars = (
            named(trace, names)
            for names in (
                "q k v",
                "u du d zd inverse weights",
                "decay last G beta tail norms",
                "full free full_u full_m free_m",
            )
        )
        function = {
            "low": chunk_fused_walk.walk_low,
            "high": chunk_fused_walk.walk_high,
            INVERT: chunk_fused_inverse.invert,
            LOAD: chunk_fused_hopper.load,
        }[role]
        of_state = (ANY, ANY, ANY, ANY)
        tokens = ((ANY, ANY),) * 4 + (ANY,)
        addresses = ((ANY, ANY, ANY, ANY, ANY), of_state, of_state, 0, 0)
        flags = (1.0, True, True, True, has_norms)
        function(tiles, factors, gates, bars, tokens, addresses, chunks, flags)
    return trace


@pytest.mark.parametrize("has_norms", [False, True], ids=["as given", "norms"])
@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
def test_what_one_role_writes_and_another_touches_is_ordered(chunks, has_norms, monkeypatch):
    roles = (*WALKS, INVERT, LOAD)
    traces = {role: _trace(role, chunks, has_norms, monkeypatch) for role in roles}
    touched = {args[0][0] for trace in traces.values() for what, *args in trace if what == "read"}
    assert touched >= {"q", "k", "v", "u", "du", "d", "zd", "inverse", "weights", "G", "tail"}
    assert KERNEL.faults(traces) == set()


@pytest.mark.parametrize(
    ("roles", "dropped"),
    [
        (WALKS, [("wait", ("full", i)) for i in range(3)]),
        ((LOAD,), [("wait", ("free", i)) for i in range(3)]),
        ((INVERT,), [("wait", ("full_u", i)) for i in range(2)]),
        (WALKS, [("wait", ("full_m", i)) for i in range(2)]),
        (("high",), [("wait", ("free_m", i)) for i in range(2)]),
        (WALKS, [("group barrier",)]),
        ((INVERT,), [("group barrier",)]),
    ],
    ids=["full", "free", "full_u", "full_m", "free_m", "groups that walk", "group that inverts"],
)
def test_a_fault_is_found_where_a_barrier_is_missing(roles, dropped, monkeypatch):
    traces = {role: _trace(role, 8, True, monkeypatch) for role in (*WALKS, INVERT, LOAD)}
    assert KERNEL.faults(without(traces, roles, *dropped))

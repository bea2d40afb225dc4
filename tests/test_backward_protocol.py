"""No two roles of a backward's kernel touch the same memory unless a barrier orders them."""

import functools

import pytest

pytest.importorskip("triton")

from protocol import ANY, Kernel, named, noted, without

from gdn_ops.kernels.chunk_hopper import has_gluon

if not has_gluon():
    pytest.skip("needs the Gluon of a Triton that is known", allow_module_level=True)


class Number(int):
    """An index as Gluon has it, of any width."""

    def to(self, _dtype):
        return self

    def __add__(self, other):
        return ANY if other is ANY else Number(int(self) + int(other))

    def __mul__(self, other):
        return ANY if other is ANY else Number(int(self) * int(other))

    def __rsub__(self, other):
        return Number(int(other) - int(self))


NUMBERS = {
    "load_gates": lambda *_: (ANY,) * 5,
    "range": lambda n: map(Number, range(n)),
}


def _replay(role, chunks, halves, _has_norms, monkeypatch):
    from gdn_ops.kernels import chunk_backward_gates as gates
    from gdn_ops.kernels import chunk_backward_replay_hopper as kernel

    with noted((kernel, gates), monkeypatch, **NUMBERS) as trace:
        function = {
            "low": kernel.walk_low,
            "high": kernel.walk_high,
            "load": kernel.load,
            "gates": kernel.make_gates,
        }[role]
        of_tokens = ((ANY, ANY), (ANY, ANY), ANY)
        function(
            named(trace, "k v X S u"),
            named(trace, "gates full_g free_g"),
            named(trace, "full free"),
            (of_tokens, (ANY, ANY, ANY), (ANY, (ANY, ANY), (ANY, ANY, ANY, ANY))),
            (0, ANY, ANY, chunks, 1),
            (1.0, 2, True, True, halves, True, True),
        )
    return trace


def _reverse(role, chunks, halves, _has_norms, monkeypatch):
    from gdn_ops.kernels import chunk_backward_gates as gates
    from gdn_ops.kernels import chunk_backward_reverse_hopper as kernel
    from gdn_ops.kernels import chunk_backward_reverse_walk as walks

    with noted((kernel, walks, gates), monkeypatch, **NUMBERS) as trace:
        function = {
            "low": walks.walk_low,
            "high": walks.walk_high,
            "weigh": walks.weigh,
            "load": kernel.load,
            "gates": kernel.make_gates,
        }[role]
        of_tokens = ((ANY, ANY), (ANY, ANY), (ANY, ANY), ANY)
        function(
            named(trace, "q k do X P dS"),
            named(trace, "gates full_g free_g"),
            named(trace, "full free full_P free_P"),
            (of_tokens, (ANY, ANY, ANY), (ANY, (ANY, ANY), (ANY, ANY, ANY, ANY), (ANY, ANY))),
            (0, ANY, ANY, chunks, ANY),
            (1.0, 2, True, True, halves, True, True, True),
        )
    return trace


def _gradients(role, chunks, _halves, has_norms, monkeypatch, valid=64, heads=2):
    from gdn_ops.kernels import chunk_backward_gates as gates
    from gdn_ops.kernels import chunk_backward_gradients_products as products
    from gdn_ops.kernels import chunk_backward_gradients_roles as roles

    place = {"place_of_tile": lambda *_: (ANY, ANY, ANY, valid, ANY)}
    with noted((roles, products, gates), monkeypatch, **NUMBERS, **place) as trace:
        function = {
            "low": products.multiply_low,
            "high": products.multiply_high,
            "states": roles.sum_states,
            "load": roles.load,
            "gates": roles.make_gates,
            "finish": roles.finish,
        }[role]
        of_tokens = ((ANY,) * 4,) * 2 + (ANY,) * 3 + ((ANY,) * 4,) * 2
        function(
            named(trace, "q k F tokens S dS"),
            named(trace, "gates sums norms state"),
            (
                named(trace, "full_qk free_qk full_t free_t full_g free_g"),
                named(trace, "full_S free_S full_dS free_dS full_p free_p full_F full_N full_o"),
            ),
            (*of_tokens, ANY, (ANY,) * 5, (ANY, ANY)),
            (ANY, ANY, ANY, ANY, ANY, chunks, ANY, ANY),
            (1.0, True, heads, 4, True, has_norms, True),
        )
    return trace


def _kernel(name, halves):
    """How a kernel is traced, its roles, and what they leave open.

    Of all gradients, chunks that are whole, or beside whose tokens are those of another sequence;
    and one value head a key head instead of two.
    """
    walks = ("low", "high")[:halves]
    if name == "replay":
        counts = {"full": 1, "free": halves, "full_g": 1, "free_g": halves}
        return _replay, (*walks, "load", "gates"), counts, {"k": 16, "v": 8, "X": 8}
    if name == "reverse":
        counts = {"full": 1, "free": halves + 1, "full_g": 1, "free_g": halves + 1}
        counts |= {"full_P": 1, "free_P": 1}
        return (
            *(_reverse, (*walks, "weigh", "load", "gates"), counts),
            {"q": 16, "k": 16, "do": 8, "X": 8},
        )
    counts = {"full_qk": 1, "free_qk": 1, "full_t": 1, "free_t": 3, "full_g": 1, "free_g": 4}
    counts |= {"full_S": 1, "free_S": 3, "full_dS": 1, "free_dS": 3, "full_p": 3, "free_p": 1}
    counts |= {"full_F": 2, "full_N": 2, "full_o": 2}
    roles = ("low", "high", "states", "load", "gates", "finish")
    kilobytes = {"q": 16, "k": 16, "tokens": 16, "S": 32, "dS": 32}
    options = {"cut": {"valid": 3}, "one head": {"heads": 1}}.get(name, {})
    return functools.partial(_gradients, **options), roles, counts, kilobytes


def _traces(name, halves, chunks, has_norms, monkeypatch):
    trace, roles, counts, kilobytes = _kernel(name, halves)
    kernel = Kernel(counts, kilobytes, {"load", "gates", "finish"})
    return kernel, {role: trace(role, chunks, halves, has_norms, monkeypatch) for role in roles}


@pytest.mark.parametrize("has_norms", [False, True], ids=["as given", "norms"])
@pytest.mark.parametrize("chunks", [1, 2, 8])
@pytest.mark.parametrize(
    ("name", "halves"),
    [
        ("replay", 1),
        ("replay", 2),
        ("reverse", 1),
        ("reverse", 2),
        ("all", 2),
        ("cut", 2),
        ("one head", 2),
    ],
)
def test_what_one_role_writes_and_another_touches_is_ordered(
    name, halves, chunks, has_norms, monkeypatch
):
    kernel, traces = _traces(name, halves, chunks, has_norms, monkeypatch)
    read = {args[0][0] for trace in traces.values() for what, *args in trace if what == "read"}
    assert read >= set(kernel.kilobytes) | {"gates"}
    assert kernel.faults(traces) == set()


BARRIERS = [
    ("replay", ["full", "free", "full_g", "free_g"]),
    ("reverse", ["full", "free", "full_g", "free_g", "full_P"]),
    (
        "all",
        [
            *("full_qk", "free_qk", "full_t", "free_t", "full_g", "free_g", "full_S", "free_S"),
            *("full_dS", "free_dS", "full_p", "free_p", "full_F", "full_N", "full_o"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("name", "barrier"), [(name, barrier) for name, bars in BARRIERS for barrier in bars]
)
def test_a_fault_is_found_where_nobody_waits_for_a_barrier(name, barrier, monkeypatch):
    kernel, traces = _traces(name, 2, 8, True, monkeypatch)
    places = (None, *range(4))
    dropped = [("wait", (barrier, place)) for place in places]
    assert kernel.faults(without(traces, traces, *dropped))

"""No two roles of a scan, or of a carry, touch the same memory unless a barrier orders them."""

import pytest

pytest.importorskip("triton")

from protocol import ANY, Kernel, named, noted, without

from gdn_ops.kernels.chunk_hopper import has_gluon

if not has_gluon():
    pytest.skip("needs the Gluon of a Triton that is known", allow_module_level=True)

KILOBYTES = {"q": 16, "k": 16, "v": 8, "inverse": 8, "weights": 8, "decays": 0.25}


def _scan(role, chunks, halves, rows, monkeypatch):
    from gdn_ops.kernels import chunk_scan_hopper as kernel
    from gdn_ops.kernels import chunk_scan_walk as walks

    with noted((kernel, walks), monkeypatch) as trace:
        function = {
            "low": walks.walk_low,
            "high": walks.walk_high,
            "load": kernel.load_chunks,
        }[role]
        tokens = ((ANY, ANY),) * 3
        sources = (*tokens, (ANY, ANY, 64 * chunks, 0), *(ANY,) * 6)
        function(
            named(trace, "q k v inverse weights decays o"),
            named(trace, "full free"),
            sources,
            *((ANY,) * 4, (ANY,) * 4),
            *(ANY, 0, chunks),
            (64, 3, halves, rows, 1.0, True, True, ANY, False, ANY),
        )
    return trace


def _carry(role, chunks, _halves, rows, monkeypatch):
    from gdn_ops.kernels import chunk_carry_hopper as kernel

    with noted((kernel,), monkeypatch, row_layout=lambda _: ANY) as trace:
        function = {
            "low": kernel.walk_low,
            "high": kernel.walk_high,
            "load": kernel.load_chunks,
        }[role]
        function(
            named(trace, "k v inverse decays"),
            named(trace, "full free"),
            ((ANY, ANY), (ANY, ANY), ANY, ANY),
            *((chunks, True, ANY), (ANY,) * 4),
            (64, 3, rows, ANY),
        )
    return trace


TRACES = {"scan": _scan, "carry": _carry}


def _traces(name, halves, chunks, rows, monkeypatch):
    kernel = Kernel({"full": 1, "free": halves}, KILOBYTES, {"load"})
    roles = (*("low", "high")[:halves], "load")
    return kernel, {role: TRACES[name](role, chunks, halves, rows, monkeypatch) for role in roles}


@pytest.mark.parametrize("rows", [2, 3], ids=["as given", "norms"])
@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
@pytest.mark.parametrize(("name", "halves"), [("scan", 1), ("scan", 2), ("carry", 2)])
def test_what_one_role_writes_and_another_touches_is_ordered(
    name, halves, chunks, rows, monkeypatch
):
    kernel, traces = _traces(name, halves, chunks, rows, monkeypatch)
    read = {args[0][0] for trace in traces.values() for what, *args in trace if what == "read"}
    assert read >= {"k", "v", "inverse", "decays"} | ({"q", "weights"} if name == "scan" else set())
    assert kernel.faults(traces) == set()


@pytest.mark.parametrize("what", ["full", "free", "group barrier"])
@pytest.mark.parametrize(("name", "halves"), [("scan", 1), ("scan", 2), ("carry", 2)])
def test_a_fault_is_found_where_a_barrier_is_missing(name, halves, what, monkeypatch):
    kernel, traces = _traces(name, halves, 8, 3, monkeypatch)
    dropped = [("group barrier",)] if " " in what else [("wait", (what, i)) for i in range(3)]
    assert kernel.faults(without(traces, traces, *dropped))

"""Calls are planned once and then repeated: what may share a plan, and what a plan repeats."""

import contextvars
import ctypes
import itertools
import types

import pytest
import torch

from gdn_ops import _plans
from gdn_ops._plans import Plans, call_key, matcher

pytest.importorskip("triton")
from triton.runtime import driver  # noqa: TID253

from gdn_ops.kernels import plan as plans
from gdn_ops.kernels.launch import launch
from gdn_ops.kernels.record import record


def _tensors():
    """Three tensors, of which the first two are alike, and none."""
    return torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(4), None


def _with(place, x):
    args = list(_tensors())
    args[place] = x
    return tuple(args)


OTHERS = {
    "a shape": (_with(0, torch.zeros(3, 8)), {}),
    "a rank": (_with(2, torch.zeros(4, 1)), {}),
    "strides": (_with(1, torch.zeros(8, 2).T), {}),
    "strides of a dimension of one": (_with(0, torch.zeros(2, 8).as_strided((1, 8), (3, 1))), {}),
    "an expanded dimension": (_with(1, torch.zeros(8).expand(2, 8)), {}),
    "a dtype": (_with(0, torch.zeros(2, 8, dtype=torch.int32)), {}),
    "a device": (_with(1, torch.zeros(2, 8, device="meta")), {}),
    "an address": (_with(0, torch.zeros(17)[1:].view(2, 8)), {}),
    "one tensor less": (_with(0, None), {}),
    "one tensor more": (_with(3, torch.zeros(2, 8)), {}),
    "another that is absent": ((torch.zeros(2, 8), None, torch.zeros(4), torch.zeros(2, 8)), {}),
    "fewer arguments": (_tensors()[:3], {}),
    "an option": (_tensors(), {"scale": 1.0}),
    "the name of an equal option": (_tensors(), {"use_qk_l2norm": True}),
}
CALLS = {"itself": (_tensors(), {})} | OTHERS


@pytest.mark.parametrize("first", CALLS)
def test_calls_that_differ_in_anything_never_share_a_plan(first):
    match = matcher(*CALLS[first])
    for other in CALLS:
        if other != first:
            assert call_key(*CALLS[other]) != call_key(*CALLS[first]), other
            assert match(*CALLS[other]) is None, other


@pytest.mark.parametrize("first", CALLS)
def test_calls_that_are_alike_share_a_plan(first):
    args, keywords = CALLS[first]
    again = tuple(x if x is None else x.clone() if x.is_contiguous() else x for x in args)
    if first != "an address":
        assert call_key(again, keywords) == call_key(args, keywords)


def test_a_matcher_finds_the_addresses_of_this_call():
    match = matcher(_tensors(), {"scale": 2.0})
    args = _tensors()
    tensors, pointers = match(args, {"scale": 2.0})
    assert all(x is y for x, y in zip(tensors, args, strict=False))
    assert pointers == [x.data_ptr() for x in args[:3]]


def test_calls_share_a_plan_without_the_guards_of_torch(monkeypatch):
    monkeypatch.setattr(_plans, "TensorGuards", None)
    found = Plans()
    found.add(_tensors(), {}, "plan")
    match, _ = found.recent
    assert match(_tensors(), {}) is None
    plan, (tensors, pointers) = found.find(_tensors(), {})
    assert (plan, len(tensors), len(pointers)) == ("plan", 3, 3)
    assert found.find(*OTHERS["strides"]) == (None, None)


def test_a_matcher_keeps_no_tensor_alive():
    import weakref

    args = _tensors()
    match = matcher(args, {})
    alive = weakref.ref(args[0])
    del args
    assert alive() is None
    assert match(_tensors(), {}) is not None


def test_the_number_of_plans_is_bounded(monkeypatch):
    monkeypatch.setattr(_plans, "MOST_PLANS", 4)
    found = Plans()
    for n in range(1, 12):
        found.add((torch.zeros(n),), {}, n)
        assert len(found) <= 4
        assert found.find((torch.zeros(n),), {})[0] == n


def test_a_plan_found_in_another_mode_is_matched_quickly_from_then_on():
    found = Plans()
    found.add(_tensors(), {}, "plan")
    for _ in range(2):
        with torch.inference_mode():
            assert found.find(_tensors(), {})[0] == "plan"
            assert found.recent[0](_tensors(), {}) is not None
        assert found.find(_tensors(), {})[0] == "plan"
        assert found.recent[0](_tensors(), {}) is not None


class Doubling:
    """A kernel for CPU memory: ``y[i] = factor * x[i]``, in the shape of a compiled one of Triton.

    It reads and writes through addresses, as a kernel does. ``arg_names`` and ``binary[grid]`` are
    what ``launch`` uses; ``run`` and ``function`` what a plan uses.
    """

    arg_names = ("x", "y", "n", "factor")

    def __init__(self):
        self.metadata = types.SimpleNamespace(global_scratch_size=0, profile_scratch_size=0)
        self.packed_metadata, self.function = (1, 1, 0), 7
        self.launch_cooperative_grid = self.launch_pdl = False
        self.arg_annotations = self.kernel_signature = None
        self.version = plans.triton.__version__
        self.streams, self.compiled = [], 0
        self.addresses, self.scratch = [], []
        self.run = self

    def __getitem__(self, grid):
        def first(x, y, n, *, factor, num_warps, num_stages, enable_fp_fusion):
            self.compiled += 1
            self._compute(x.data_ptr(), y.data_ptr(), n, factor)
            return self

        return first

    def launch_metadata(self, grid, stream, *args):
        return {"grid": grid}

    def __call__(self, x, y, z, stream, function, packed, metadata, before, after, *args):
        self.streams.append(stream)
        if before is not None:
            before(metadata)
        self._compute(*args)
        if after is not None:
            after(metadata)

    def launch(self, x, y, z, stream, function, cooperative, pdl, *rest):
        """The C function of Triton 3.6 or 3.7."""
        if self.version.startswith("3.6"):
            scratch, _, packed, metadata, before, after, *args = rest
        else:
            packed, metadata, before, after, scratch, _, *_, args = rest
        self.scratch.append(scratch)
        self(x, y, z, stream, function, packed, metadata, before, after, *args)

    def _compute(self, x, y, n, factor):
        self.addresses.append((x, y))
        source, target = ((ctypes.c_float * n).from_address(p) for p in (x, y))
        target[:] = [factor * value for value in source]


@pytest.fixture
def kernel(monkeypatch):
    """The kernel, and a driver whose streams are numbered."""
    stand_in = types.SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: stand_in.stream, stream=0
    )
    monkeypatch.setattr(driver, "_active", stand_in, raising=False)
    monkeypatch.setattr(type(driver), "active", property(lambda self: stand_in))
    result = Doubling()
    result.driver = stand_in
    return result


def _launching(kernel, x, factor=2.0, before=None):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(kernel, 1, (x, y), (x.numel(),), 1, 1, factor=factor)
    return y


def _planned(call, *args):
    result, plan = record(lambda: call(*args), args)
    return result, plan


def _repeat(plan, *tensors):
    return plan(tensors, [x.data_ptr() for x in tensors])


def test_a_plan_repeats_a_call_on_other_tensors(kernel):
    first, plan = _planned(lambda x: _launching(kernel, x), torch.ones(2, 8))
    x = torch.arange(16.0).view(2, 8)
    results = [_repeat(plan, x) for _ in range(3)]
    assert torch.equal(first, torch.full((2, 8), 2.0))
    assert kernel.compiled == 1
    for y in results:
        assert torch.equal(y, 2 * x)
    assert len({y.data_ptr() for y in results}) == 3


def test_a_plan_repeats_what_torch_did_between_the_launches(kernel):
    def call(x):
        doubled = _launching(kernel, x.mT.contiguous())
        total = doubled.sum(0)
        return _launching(kernel, total, factor=2.0), doubled, x.new_empty(0)

    _, plan = _planned(call, torch.ones(3, 4))
    x = torch.arange(12.0).view(3, 4)
    total, doubled, nothing = _repeat(plan, x)
    assert torch.equal(doubled, 2 * x.mT)
    assert torch.equal(total, 4 * x.sum(1))
    assert nothing.shape == (0,)


def test_a_plan_keeps_the_layout_of_what_is_allocated(kernel):
    def call(x):
        return torch.empty_strided((2, 3), (1, 4), dtype=torch.float16), torch.empty_like(x.mT)

    results, plan = _planned(call, torch.ones(2, 8))
    for x, y in zip(_repeat(plan, torch.ones(2, 8)), results, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.fixture
def unfilled():
    """Memory is not filled: as users run, not the tests."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


def _through_pieces(kernel, x):
    """``2 * x``, and ``8 * x`` by way of two tensors that only kernels see."""
    doubled, last = torch.empty_like(x), torch.empty_like(x)
    pieces = torch.empty(2, x.numel()), torch.empty(x.shape, dtype=torch.float64)
    for source, target in ((x, doubled), (doubled, pieces[0]), pieces, (pieces[1], last)):
        factor = 1.0 if target is last else 2.0
        launch(kernel, 1, (source, target), (x.numel(),), 1, 1, factor=factor)
    return doubled, last


def test_what_only_kernels_see_comes_from_one_allocation(kernel, unfilled):
    _, plan = _planned(lambda x: _through_pieces(kernel, x), torch.ones(5))
    x = torch.arange(5.0)
    kernel.addresses.clear()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        doubled, last = _repeat(plan, x)
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(last, 8 * x)
    sizes = [e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0]
    assert sorted(sizes) == [20, 20, 1024]
    (_, first), (_, second) = kernel.addresses[1:3]
    assert second - first == 512


@pytest.fixture(params=["3.6.0", "3.7.1"])
def direct(request, kernel, monkeypatch):
    """The kernel, started as this version of Triton starts one."""
    monkeypatch.setattr(plans.triton, "__version__", request.param)
    kernel.version = request.param
    return kernel


def test_scratch_of_a_kernel_is_a_piece_of_the_block(direct, unfilled):
    direct.metadata = types.SimpleNamespace(global_scratch_size=600, profile_scratch_size=0)
    _, plan = _planned(lambda x: _through_pieces(direct, x), torch.ones(5))
    x = torch.arange(5.0)
    direct.addresses.clear()
    assert torch.equal(_repeat(plan, x)[1], 8 * x)
    (_, first), (_, second) = direct.addresses[1:3]
    assert len(direct.scratch) == 4
    places = sorted([first, second, *direct.scratch])
    assert all(y - x >= 512 for x, y in itertools.pairwise(places))
    assert all(y - x >= 1024 for x, y in itertools.pairwise(sorted(direct.scratch)))


def test_kernels_that_run_beside_each_other_share_no_scratch(monkeypatch):
    monkeypatch.setattr(plans, "new_scratch", lambda size, *_: torch.empty(size, dtype=torch.int8))
    scratch = plans.Scratch()
    assert len({scratch(512, 128, None).data_ptr() for _ in range(4)}) == 4


def test_a_kernel_without_scratch_gets_none(direct):
    _, plan = _planned(lambda x: _launching(direct, x), torch.ones(5))
    _repeat(plan, torch.ones(5))
    assert direct.scratch == [None]


@pytest.mark.skipif(
    plans._version() not in plans._DIRECT, reason="a launch calls Triton's own class"
)
def test_a_direct_launch_passes_what_the_launcher_of_this_triton_passes(kernel, monkeypatch):
    """Read from Triton's own class, with a hook set and with scratch, whose address may differ."""
    import triton
    from triton import knobs
    from triton.backends.nvidia.driver import CudaLauncher

    passed = []
    launcher = CudaLauncher.__new__(CudaLauncher)
    names = ("arg_annotations", "kernel_signature", "launch_cooperative_grid", "launch_pdl")
    sizes = {"global_scratch_size": 600, "profile_scratch_size": 0}
    aligns = {"global_scratch_align": 128, "profile_scratch_align": 1}
    vars(launcher).update({name: name for name in names}, num_ctas=1, **sizes, **aligns)
    launcher.launch = lambda *args: passed.append(args)
    kernel.run, kernel.metadata = launcher, types.SimpleNamespace(**sizes)
    hooks = ("before", "after")
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hooks[0])
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", hooks[1])
    _, plan = _planned(lambda x: _launching(kernel, x), torch.ones(4))
    y = _repeat(plan, x := torch.ones(4))
    args = (x.data_ptr(), y.data_ptr(), 4, 2.0)
    metadata = kernel.launch_metadata((1, 1, 1), 0)

    def launch_as_triton():
        triton.set_allocator(lambda size, alignment, stream: "scratch")
        launcher(1, 1, 1, 0, kernel.function, kernel.packed_metadata, metadata, *hooks, *args)

    contextvars.copy_context().run(launch_as_triton)
    direct, of_triton = map(list, passed)
    place = of_triton.index("scratch")
    assert isinstance(direct.pop(place), int)
    of_triton.pop(place)
    assert direct == of_triton


def test_planned_memory_is_filled_where_torch_fills_what_it_allocates(kernel):
    _, plan = _planned(lambda x: (torch.empty_like(x), torch.empty(2)), torch.ones(3))
    assert all(x.isnan().all() for x in _repeat(plan, torch.ones(3)))


@pytest.mark.parametrize("is_inference", [False, True])
def test_results_of_a_plan_are_tensors_of_inference_where_those_of_torch_are(
    kernel, unfilled, is_inference
):
    _, plan = _planned(lambda x: _launching(kernel, x), torch.ones(4))
    with torch.inference_mode(is_inference):
        y = _repeat(plan, torch.ones(4))
        assert y.is_inference() == torch.empty(4).is_inference() == is_inference


def test_a_plan_launches_on_the_stream_of_each_call(kernel):
    _, plan = _planned(lambda x: _launching(kernel, x), torch.ones(4))
    for stream in (3, 0, 5):
        kernel.driver.stream = stream
        _repeat(plan, torch.ones(4))
    assert kernel.streams == [3, 0, 5]


def test_a_profiler_that_comes_later_sees_a_planned_launch(kernel):
    from triton import knobs

    _, plan = _planned(lambda x: _launching(kernel, x), torch.ones(4))
    seen = []
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    for hook in hooks:
        hook.add(seen.append)
    try:
        _repeat(plan, torch.ones(4))
    finally:
        for hook in hooks:
            hook.remove(seen.append)
    _repeat(plan, torch.ones(4))
    assert seen == [{"grid": (1, 1, 1)}] * 2


CONSTANT = torch.ones(3)
NOT_REPEATED = {
    "a number read from memory": lambda x: torch.full((1,), x.sum().item()),
    "a tensor of no call": lambda x: CONSTANT,
    "two results": lambda x: torch.max(x, 0)[0],
    "a list of tensors": lambda x: torch.cat([x, x]),
}


@pytest.mark.parametrize("call", NOT_REPEATED)
def test_what_cannot_be_repeated_has_no_plan(kernel, call):
    assert _planned(NOT_REPEATED[call], torch.ones(4))[1] is None


def test_the_interpreter_leaves_no_plan(kernel):
    class Interpreted(Doubling):
        def __getitem__(self, grid):
            return lambda *args, **options: None

    assert _planned(lambda x: _launching(Interpreted(), x), torch.ones(4))[1] is None

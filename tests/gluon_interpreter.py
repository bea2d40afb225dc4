"""Kernels in Gluon on a CPU: their Python runs, with tensors of torch for what a GPU would have.

Each role of a program is a thread, and an mbarrier holds it until its phase is over; a program in
which all wait for ever fails. Layouts are ignored, products are of float32 with operands as they
are, asynchronous copies and products are done when they are asked for: what orders them is the
business of tests/protocol.py. A pointer outside of its tensor's memory fails, as memory that a
mask does not hide.
"""

import contextlib
import threading

import torch
from protocol import stand_in

# Longer than any wait that ends; roles of a test take milliseconds.
PATIENCE = 60.0


class Pointer:
    """A place in the memory of a tensor, or a tile of them."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset

    @classmethod
    def to(cls, x):
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return cls(memory, torch.tensor(x.storage_offset()))

    def __add__(self, steps):
        return Pointer(self.memory, self.offset + steps)

    @property
    def dtype(self):
        return self

    @property
    def element_ty(self):
        return self.memory.dtype

    def places(self, mask):
        """Places, a mask, each of the same shape; where the mask is they are in the memory."""
        mask = torch.as_tensor(True if mask is None else mask)
        places, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), mask)
        hidden = places.masked_select(mask)
        assert ((hidden >= 0) & (hidden < len(self.memory))).all(), "outside of a tensor's memory"
        return places.where(mask, torch.tensor(0)), mask


class Memory:
    """Shared memory of a program, NaN until it is written."""

    def __init__(self, data):
        self.data = data

    @property
    def dtype(self):
        return self.data.dtype

    def index(self, i):
        return Memory(self.data[int(i)])

    def slice(self, start, length, dim=0):
        return Memory(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Memory(self.data.permute(order))

    def _reinterpret(self, dtype, shape, _layout):
        assert dtype == self.dtype
        return Memory(self.data.view(shape))

    def load(self, _layout):
        return self.data.clone()

    def store(self, x):
        assert x.dtype == self.dtype
        self.data.copy_(x)


class Barrier:
    """An mbarrier, and the threads that wait for it."""

    changed, has_failed = threading.Condition(), False

    def init(self, count):
        self.count = self.arrivals = count
        self.bytes = self.phases = 0

    def arrive(self, arrivals, size=0):
        with Barrier.changed:
            self.arrivals -= arrivals
            self.bytes += size
            assert self.arrivals >= 0, "a phase has more arrivals than it counts"
            if self.arrivals == self.bytes == 0:
                self.arrivals, self.phases = self.count, self.phases + 1
                Barrier.changed.notify_all()

    def wait(self, parity):
        with Barrier.changed:
            is_over = Barrier.changed.wait_for(
                lambda: Barrier.has_failed or self.phases & 1 != parity, PATIENCE
            )
            assert is_over, "a role waits for ever"
            assert not Barrier.has_failed, "another role failed"


class Barriers:
    """Several, as ``allocate_shared_memory`` makes them."""

    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.all[int(i)]


class MBarrier:
    """``mbarrier``."""

    MBarrierLayout = staticmethod(lambda: Barriers)
    init = staticmethod(lambda bar, count: bar.init(count))
    expect = staticmethod(lambda bar, size: bar.arrive(1, size))
    wait = staticmethod(lambda bar, parity: bar.wait(int(parity)))

    @staticmethod
    def arrive(bar, count, pred=True):
        if pred:
            bar.arrive(count)


class Copies:
    """``tma``."""

    @staticmethod
    def make_tensor_descriptor(base, shape, strides, box, _layout):
        def places(first):
            """Of a box: its places, and which of them are in the tensor."""
            steps, mask = torch.zeros(box, dtype=torch.int64), torch.ones(box, dtype=torch.bool)
            for dim, (start, size, stride) in enumerate(zip(first, shape, strides, strict=True)):
                at = int(start) + torch.arange(box[dim])
                at = at.view([-1 if d == dim else 1 for d in range(len(box))])
                steps, mask = steps + at * int(stride), mask & (at >= 0) & (at < int(size))
            return (base + steps).places(mask)

        return base.memory, places

    @staticmethod
    def async_copy_global_to_shared(descriptor, first, bar, tile):
        memory, places = descriptor
        at, mask = places(first)
        tile.data.copy_(memory[at].where(mask, torch.zeros((), dtype=memory.dtype)))
        bar.arrive(0, -tile.data.numel() * tile.data.itemsize)

    @staticmethod
    def async_copy_shared_to_global(descriptor, first, tile):
        memory, places = descriptor
        at, mask = places(first)
        memory[at[mask]] = tile.data[mask]

    store_wait = staticmethod(lambda _count: None)


def multiply(a, b, sums, use_acc=True, is_async=False):
    """``warpgroup_mma``."""
    assert is_async
    a, b = (x.data if isinstance(x, Memory) else x for x in (a, b))
    assert a.dtype == b.dtype
    product = a.float() @ b.float()
    return sums + product if use_acc else product


def split_operand(x):
    """``split_operand`` of chunk_fused_walk.py, which is assembly."""
    high = x.to(torch.bfloat16)
    return high, (x - high.float()).to(torch.bfloat16)


def round_operand(x):
    """``round_operand`` of chunk_fused_inverse.py."""
    rounded = x.to(torch.bfloat16)
    return rounded, -rounded.float()


class Language:
    """``gl``: what the kernels use of it."""

    int32, int64, float32, bfloat16 = torch.int32, torch.int64, torch.float32, torch.bfloat16
    static_range, program, programs = staticmethod(range), 0, 0

    zeros = staticmethod(lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype))
    zeros_like, exp2, log2, abs = torch.zeros_like, torch.exp2, torch.log2, torch.abs
    reshape, rsqrt = torch.reshape, torch.rsqrt
    join = staticmethod(lambda x, y: torch.stack((x, y), -1))
    split = staticmethod(lambda x: x.unbind(-1))
    # Of a register that is moved.
    inline_asm_elementwise = staticmethod(lambda _asm, _constraints, args, *_: args[0])
    arange = staticmethod(lambda start, end, layout: torch.arange(start, end))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    max = staticmethod(lambda x, axis: x.amax(axis))
    min = staticmethod(lambda x, axis: x.amin(axis))
    cdiv = staticmethod(lambda a, b: -(-a // b))
    convert_layout = staticmethod(lambda x, _layout: x)
    SliceLayout = NVMMADistributedLayout = DotOperandLayout = staticmethod(lambda *_: None)
    BlockedLayout = SliceLayout
    NVMMASharedLayout = SwizzledSharedLayout = staticmethod(lambda *_, **__: None)
    static_assert = staticmethod(lambda condition: None)

    @classmethod
    def program_id(cls, _axis):
        return torch.tensor(cls.program)

    @classmethod
    def num_programs(cls, _axis):
        return torch.tensor(cls.programs)

    @staticmethod
    def minimum(a, b):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def maximum(a, b):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def where(condition, x, y):
        x, y = (torch.as_tensor(z) for z in (x, y))
        dtype = max((x, y), key=lambda z: z.dim()).dtype
        return torch.where(torch.as_tensor(condition), x.to(dtype), y.to(dtype))

    @staticmethod
    def associative_scan(x, axis, combine, reverse=False):
        assert combine(1, 2) == 3
        return x.flip(axis).cumsum(axis).flip(axis) if reverse else x.cumsum(axis)

    @staticmethod
    def load(pointer, mask=None, other=0.0):
        places, mask = pointer.places(mask)
        found = pointer.memory[places]
        return found.where(mask, torch.tensor(other, dtype=found.dtype))

    @staticmethod
    def store(pointer, x, mask=None):
        x = torch.as_tensor(x)
        assert x.dtype == pointer.memory.dtype
        places, mask = pointer.places(mask)
        pointer.memory[places[mask]] = x.expand(places.shape)[mask]

    @staticmethod
    def allocate_shared_memory(dtype, shape, layout):
        if layout is Barriers:
            return Barriers(shape[0])
        return Memory(torch.full(shape, torch.nan, dtype=dtype))

    @staticmethod
    def warp_specialize(roles, _warps, _registers):
        failures = []

        def play(function, args):
            try:
                function(*args)
            except BaseException as failure:
                failures.append(failure)
                with Barrier.changed:
                    Barrier.has_failed = True
                    Barrier.changed.notify_all()

        Barrier.has_failed = False
        threads = [threading.Thread(target=play, args=role) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def _as_argument(x):
    return Pointer.to(x) if isinstance(x, torch.Tensor) else x


class Launcher:
    """A kernel, launched as one of Triton's."""

    OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, 0

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.calls += 1
            args = [_as_argument(x) for x in args]
            constants = {
                name: _as_argument(x) for name, x in constants.items() if name not in self.OPTIONS
            }
            if "DOT" in constants:
                constants["DOT"] = {"bf16": torch.bfloat16}[str(constants["DOT"])]
            Language.programs = grid[0]
            for Language.program in range(grid[0]):
                self.kernel(*args, **constants)

        return launch


def _bounds(cu_seqlens, i_n, stride, N, T):
    """``load_bounds`` of chunk_prepare.py."""
    start = Language.load(cu_seqlens + i_n * stride)
    end = Language.load(cu_seqlens + (i_n + 1) * stride) if i_n < N else torch.tensor(T)
    start, end = (x.clamp(max=T) for x in (start, end))
    return start, (end - start).clamp(min=0)


def _expect_done(p_done):
    """``wait_for_chunk`` of chunk_scan_walk.py; the kernel before is over here."""
    assert Language.load(p_done) == 1


@contextlib.contextmanager
def interpreted(modules, monkeypatch):
    """While it lasts, kernels of these modules run here. Gives launchers by the kernels' names."""
    launchers = {
        name: Launcher(x.fn)
        for module in modules
        for name, x in vars(module).items()
        if name.endswith("_kernel")
    }
    stand_ins = {
        "gl": Language,
        "mbarrier": MBarrier,
        "tma": Copies,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": lambda _count, deps: deps if len(deps) > 1 else deps[0],
        "mma_v2": lambda a, b, sums: sums + a.float() @ b.float(),
        "split_operand": split_operand,
        "round_operand": round_operand,
        "column": lambda x, _columns, i: x[:, :, i : i + 1],
        "fence_async_shared": lambda: None,
        "group_barrier": lambda: None,
        "start_next": lambda: None,
        "wait_for_kernel_before": lambda: None,
        "wait_for_chunk": _expect_done,
        "load_bounds_of_sequence": _bounds,
        # Indices have any width.
        "range": lambda *ends: map(torch.tensor, range(*map(int, ends))),
        **launchers,
    }
    with monkeypatch.context() as patch:
        stand_in(modules, patch, stand_ins)
        yield launchers

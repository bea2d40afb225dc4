"""Roles of a kernel in Gluon without a GPU: their Python runs on stand-ins, and is played.

The stand-ins note which tiles of shared memory are read and written, and what is waited for;
numbers are left out. What was noted is then played with the rules of mbarriers, in random orders of
the roles, and vector clocks say whether two accesses are ordered in every one. A role has two
warps, which ``group_barrier`` alone brings together; what the warps of one role share Triton's own
analysis orders. racecheck would see accesses too, but not all of what orders them
(benchmarks/results/h200-2026-11-30.md).
"""

import contextlib
import random


class Anything:
    """A number or a tile of them: whatever is done with it is another."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **options):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __call__
    __and__ = __or__ = __floordiv__ = __lt__ = __gt__ = __ge__ = __eq__ = __getitem__ = __call__
    __mod__ = __rmod__ = __rand__ = __truediv__ = __call__
    __hash__ = object.__hash__


ANY = Anything()


class Tile:
    """Tiles of shared memory, or barriers: a name, the place of one of several, and its halves.

    A tile is two halves of columns, which two roles may write each for itself.
    """

    def __init__(self, trace, name, place=None, halves=(0, 1)):
        self.trace, self.key, self.halves = trace, (name, place), halves

    def index(self, place):
        return Tile(self.trace, self.key[0], place)

    def slice(self, start, length, dim=0):
        halves = (start // length,) if (dim, length) == (1, 64) else self.halves
        return Tile(self.trace, *self.key, halves)

    def permute(self, *_):
        return self

    _reinterpret = permute

    @property
    def parts(self):
        """What is accessed, by name, place and half."""
        return [(*self.key, half) for half in self.halves]

    def load(self, _layout):
        self.trace += [("read", part) for part in self.parts]
        return ANY

    def store(self, _numbers):
        self.trace += [("write", part) for part in self.parts]

    def __getattr__(self, name):
        return ANY


def named(trace, names):
    """A tile for each of these names."""
    return tuple(Tile(trace, name) for name in names.split())


class Language:
    """``gl``, where only what decides what is done next is computed."""

    static_range, minimum = staticmethod(range), staticmethod(min)

    def __getattr__(self, name):
        return lambda *args, **options: ANY

    @staticmethod
    def where(condition, x, y):
        return (x if condition else y) if isinstance(condition, bool) else ANY


class Products:
    """Of warp groups: operands are read from the issue of a product until it is waited for."""

    def __init__(self, trace):
        self.trace, self.under_way = trace, []

    def multiply(self, *operands, **_):
        tiles = [("read", part) for x in operands if isinstance(x, Tile) for part in x.parts]
        self.trace += tiles
        self.under_way.append(tiles)
        return ANY

    def wait(self, count, deps):
        while len(self.under_way) > count:
            self.trace += self.under_way.pop(0)
        return deps if len(deps) > 1 else deps[0]


class Copies:
    """``tma``: a store reads until it is waited for, a load writes until its barrier has it."""

    def __init__(self, trace):
        self.trace, self.stored = trace, []

    def make_tensor_descriptor(self, *_):
        return ANY

    def async_copy_global_to_shared(self, _, __, bar, tile):
        self.trace.append(("fill", tile.parts, bar.key))

    def async_copy_shared_to_global(self, _, __, tile):
        read = [("read one", part) for part in tile.parts]
        self.stored += read
        self.trace += read

    def store_wait(self, count):
        assert count == 0
        self.trace += self.stored
        self.stored.clear()


class Barriers:
    """``mbarrier``."""

    def __init__(self, trace):
        self.trace = trace

    def wait(self, bar, parity):
        self.trace.append(("wait", bar.key, parity))

    def arrive(self, bar, count, pred=True):
        if pred:
            self.trace.append(("arrive", bar.key, count))

    def expect(self, bar, size):
        self.trace.append(("expect", bar.key, size))


def stand_in(modules, patch, stand_ins):
    """Functions of these modules become Python's, with numbers for constexprs and these names.

    ``range`` among them is each module's own.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonJITFunction

    for module in modules:
        for name, x in list(vars(module).items()):
            if name in stand_ins:
                patch.setattr(module, name, stand_ins[name])
            elif isinstance(x, GluonJITFunction):
                patch.setattr(module, name, x.fn)
            elif isinstance(x, gl.constexpr):
                patch.setattr(module, name, x.value)
        if "range" in stand_ins:
            patch.setattr(module, "range", stand_ins["range"], raising=False)


@contextlib.contextmanager
def noted(modules, monkeypatch, **others):
    """A list of what the functions of these modules do; ``others`` take the places of some."""
    trace = []
    products = Products(trace)
    stand_ins = {
        "gl": Language(),
        "mbarrier": Barriers(trace),
        "tma": Copies(trace),
        "warpgroup_mma": products.multiply,
        "warpgroup_mma_wait": products.wait,
        "mma_v2": lambda *_: ANY,
        "fence_async_shared": lambda: None,
        "group_barrier": lambda: trace.append(("group barrier",)),
        "wait_for_kernel_before": lambda: None,
        **others,
    }
    with monkeypatch.context() as patch:
        stand_in(modules, patch, stand_ins)
        yield trace


class BrokenError(Exception):
    """What cannot be played to its end."""


class Phases:
    """An mbarrier: arrivals and bytes that its phase still waits for, and the clock of the past."""

    def __init__(self, count):
        self.count = self.arrivals = count
        self.bytes, self.done, self.next, self.past = 0, 0, {}, {}

    def arrive(self, clock, arrivals=0, size=0):
        join(self.next, clock)
        self.arrivals -= arrivals
        self.bytes += size
        if self.arrivals < 0:
            raise BrokenError("a phase has more arrivals than it counts")
        if self.arrivals == self.bytes == 0:
            join(self.past, self.next)
            self.arrivals, self.done = self.count, self.done + 1

    def is_over(self, parity):
        return self.done & 1 != parity


def join(clock, other):
    for thread, time in other.items():
        clock[thread] = max(clock.get(thread, 0), time)


class Kernel:
    """What the traces of roles leave open.

    Args:
        counts: Who arrives at a barrier before a phase of it is over, by its name.
        kilobytes: What a load brings into a tile, by its name.
        single: Roles of one warp.
    """

    def __init__(self, counts, kilobytes, single):
        self.counts, self.kilobytes, self.single = counts, kilobytes, single

    def faults(self, traces, runs=30):
        """Races in any of so many orders, or why one has no end."""
        found = set()
        for seed in range(runs):
            try:
                found |= Run(self, traces, seed).go()
            except BrokenError as fault:
                found.add(str(fault))
        return found


class Run:
    """One order of the roles; ``races`` has pairs of accesses that nothing orders."""

    def __init__(self, kernel, traces, seed):
        self.kernel, self.random = kernel, random.Random(seed)
        warps = {role: range(1 if role in kernel.single else 2) for role in traces}
        self.threads = {(role, w): 0 for role in traces for w in warps[role]}
        # Some roles are slow.
        self.weights = {role: self.random.choice((1, 30)) for role in (*traces, "copy")}
        self.traces, self.clocks = traces, {thread: {thread: 1} for thread in self.threads}
        self.bars, self.accesses, self.races = {}, {}, set()
        # Loads under way, each a thread of its own, which end in any order.
        self.copies, self.fills = {}, 0

    def go(self):
        while ready := [t for t in (*self.threads, *self.copies) if self._is_ready(t)]:
            [thread] = self.random.choices(ready, [self.weights[t[0]] for t in ready])
            if thread in self.copies:
                bar, size = self.copies.pop(thread)
                self._bar(bar).arrive(self.clocks.pop(thread), size=-size)
            else:
                self._step(thread)
        left = [t for t, at in self.threads.items() if at < len(self.traces[t[0]])]
        if left:
            raise BrokenError(f"roles wait for ever: {left}")
        return self.races

    def _bar(self, key):
        return self.bars.setdefault(key, Phases(self.kernel.counts[key[0]]))

    def _is_ready(self, thread):
        if thread in self.copies:
            return True
        role, at = thread[0], self.threads[thread]
        if at == len(self.traces[role]):
            return False
        what, *args = self.traces[role][at]
        if what == "wait":
            return self._bar(args[0]).is_over(args[1])
        others = [t for t in self.threads if t[0] == role]
        return what != "group barrier" or all(self.threads[t] == at for t in others)

    def _step(self, thread):
        role, clock = thread[0], self.clocks[thread]
        what, *args = self.traces[role][self.threads[thread]]
        clock[thread] += 1
        if what == "group barrier":
            warps = [t for t in self.threads if t[0] == role]
            for t in warps:
                join(clock, self.clocks[t])
            for t in warps:
                join(self.clocks[t], clock)
                self.threads[t] += 1
            return
        self.threads[thread] += 1
        if what == "wait":
            join(clock, self._bar(args[0]).past)
        elif what in ("read", "write"):
            self._access(what, args[0], thread, clock)
        elif thread[1] == 0:  # the rest does one thread of a role
            self._alone(what, args, thread, clock)

    def _alone(self, what, args, thread, clock):
        if what == "arrive":
            self._bar(args[0]).arrive(clock, args[1])
        elif what == "expect":
            self._bar(args[0]).arrive(clock, 1, args[1])
        elif what == "read one":
            self._access("read", args[0], thread, clock)
        elif what == "fill":
            parts, bar = args
            self.fills += 1
            copy = ("copy", self.fills)
            self.copies[copy] = bar, 1024 * self.kernel.kilobytes[parts[0][0]]
            self.clocks[copy] = {**clock, copy: 1}
            for part in parts:
                self._access("write", part, copy, self.clocks[copy])

    def _access(self, what, key, thread, clock):
        earlier = self.accesses.setdefault(key, {})
        if what == "read" and not any(kind == "write" for _, kind in earlier):
            self.races.add((key[0], None, "no write", thread[0], what))
        for (other, kind), time in earlier.items():
            if "write" in (what, kind) and other[0] != thread[0] and clock.get(other, 0) < time:
                self.races.add((key[0], other[0], kind, thread[0], what))
        earlier[thread, what] = clock[thread]


def without(traces, roles, *dropped):
    """Traces whose roles lack what begins like this."""
    return {
        role: [x for x in trace if role not in roles or not any(x[: len(d)] == d for d in dropped)]
        for role, trace in traces.items()
    }

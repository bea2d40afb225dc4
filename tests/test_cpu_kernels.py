"""``recurrent`` and ``recurrent_`` in C: which calls it serves, and what where it cannot be built.

That it computes what the operators mean is in the files of their laws, which have a form for it.
"""

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from delta_rule_cases import assert_equals_oracle
from hypothesis import given
from hypothesis import strategies as st
from inputs import cu_seqlens, make_inputs, make_state
from tolerance import assert_bitwise_equal

import gdn_ops
from gdn_ops.cpu import build, chunk_backward
from gdn_ops.cpu.call import Call, allocator
from gdn_ops.cpu.recurrent import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def served(monkeypatch):
    """The calls that the C served."""
    calls = []
    call = Plan.__call__
    monkeypatch.setattr(Plan, "__call__", lambda *args: calls.append(args) or call(*args))
    return calls


def assert_all_equal(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert_bitwise_equal(x, y)


def test_this_machine_has_a_compiler():
    assert isinstance(build.load("recurrent"), ctypes.CDLL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_is_served_in_c(dtype, served):
    tokens = make_inputs(2, 1, 2, 4, 32, 16, dtype)
    gdn_ops.recurrent_(*tokens, make_state(2, 4, 16, 32, dtype))
    gdn_ops.recurrent(*tokens)
    assert len(served) == 2


@pytest.mark.parametrize("K", [32, 200])
def test_gradients_are_served_in_c(K, monkeypatch):
    calls = []
    plan, call = chunk_backward.Plan, chunk_backward.Plan.__call__
    monkeypatch.setattr(plan, "__call__", lambda *args: calls.append(args) or call(*args))
    tokens = [x.requires_grad_() for x in make_inputs(1, 5, 1, 2, K, 16)]
    o, _ = gdn_ops.chunk(*tokens)
    torch.autograd.grad(o.sum(), tokens)
    assert len(calls) == 1


def test_what_the_c_does_not_serve_is_computed_all_the_same(served):
    tokens = make_inputs(2, 3, 2, 4, 32, 16)
    state = make_state(2, 4, 16, 32)
    exact = gdn_ops.recurrent_(*tokens, state.clone(), exact=True)
    wide = gdn_ops.recurrent_(*(x.double() for x in tokens), state.double())
    across, _ = gdn_ops.recurrent(*tokens, state.mT.contiguous().mT)
    assert not served
    for o in (exact, across):
        torch.testing.assert_close(o.double(), wide, rtol=1e-5, atol=1e-5)


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    pool=st.sampled_from((None, *DTYPES)),
    K=st.integers(1, 40),
    V=st.integers(1, 20),
    R=st.integers(1, 3),
)
def test_rows_and_keys_need_not_fill_a_vector(data, dtype, pool, K, V, R):
    T, H = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    kda, l2norm = data.draw(st.booleans()), data.draw(st.booleans())
    tokens = make_inputs(2, T, H, H * R, K, V, dtype, kda=kda)
    state = None if pool is None else make_state(2, H * R, V, K, pool)
    call = (*tokens, state, None), {"use_qk_l2norm": l2norm}
    assert_equals_oracle(gdn_ops.recurrent, call)


@pytest.mark.parametrize("operator", [gdn_ops.recurrent, gdn_ops.chunk], ids=["recurrent", "chunk"])
def test_threads_do_not_change_a_bit(operator):
    tokens = make_inputs(3, 20, 2, 8, 64, 64)
    inputs = [x.requires_grad_() for x in (*tokens, make_state(3, 8, 64, 64))]
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            o, final_state = operator(*inputs)
            loss = (o * o).sum() + final_state.sum()
            results.append((o, final_state, *torch.autograd.grad(loss, inputs)))
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        assert_all_equal(result, results[0])


def test_memory_for_outputs_is_filled_where_pytorch_is_asked_to():
    """As every test asks: what the C left unwritten is seen."""
    assert allocator((3, 4), torch.float32)().isnan().all()


def make_gradient(threads, scale):
    """A call of the gradient with so many threads, of outputs' gradients of this scale."""
    torch.set_num_threads(threads)
    tokens = [x.requires_grad_() for x in make_inputs(2, 256, 2, 4, 64, 64)]
    o, _ = gdn_ops.chunk(*tokens)
    d_o = torch.full_like(o, scale)
    return lambda: torch.autograd.grad(o, tokens, d_o, retain_graph=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_call_leaves_small_numbers_to_its_caller(threads):
    """Within it they are zero, in each of its threads; what torch computes then has them still."""
    small = torch.full((1 << 20,), 1e-40)
    gradients = make_gradient(2, 1e-40)()
    assert not any(x.any() for x in gradients)
    assert (small * 1).all()


def test_gradients_that_have_decayed_take_no_longer(threads):
    """Arithmetic with numbers below the least normal one would take many times as long."""
    calls, times = [make_gradient(1, scale) for scale in (1.0, 1e-40)], ([], [])
    for _ in range(7):
        for call, taken in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    normal, small = map(min, times)
    assert small < 3 * normal


def test_calls_of_several_threads_do_not_share_their_arguments():
    tokens = make_inputs(2, 1, 2, 4, 32, 16)
    states = [make_state(2, 4, 16, 32, seed=seed) for seed in range(4)]
    expected = [gdn_ops.recurrent(*tokens, state) for state in states]
    found = [None] * len(states)

    def work(i):
        for _ in range(200):
            found[i] = gdn_ops.recurrent(*tokens, states[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, wanted in zip(found, expected, strict=True):
        assert_all_equal(actual, wanted)


def test_packed_sequences_of_no_tokens_hand_on_their_states(served):
    tokens = make_inputs(1, 5, 2, 4, 32, 16)
    state = make_state(3, 4, 16, 32, torch.bfloat16)
    o, final_state = gdn_ops.recurrent(*tokens, state, cu_seqlens([0, 3, 0]))
    assert len(served) == 1
    assert_bitwise_equal(final_state[[0, 2]], state[[0, 2]])
    assert torch.equal(o[:, 3:], torch.zeros_like(o[:, 3:]))


def test_the_structure_is_that_of_the_source(tmp_path):
    source = Path(build.__file__).with_name("recurrent.c")
    (tmp_path / "size.c").write_text(
        f'#include "{source}"\nint size(void) {{ return sizeof(Call); }}'
    )
    command = ["cc", "-shared", "-fPIC", str(tmp_path / "size.c"), "-o", str(tmp_path / "size.so")]
    subprocess.run([*command, "-lm"], check=True)
    assert ctypes.CDLL(str(tmp_path / "size.so")).size() == ctypes.sizeof(Call)
    assert [name for name, _ in Call._fields_][-2:] == ["threads", "scale"]


def run(script, **environment):
    env = {key: x for key, x in os.environ.items() if key != "CC"} | environment
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


DECODE = """
import logging, sys
import torch, gdn_ops
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
tokens = [torch.ones(1, 1, 1, 8)] * 3
for _ in range(2):
    o = gdn_ops.recurrent_(*tokens, None, None, torch.zeros(1, 1, 8, 8))
print(o.sum().item())
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": ""}, "there is no C compiler (cc, gcc, clang or $CC)"),
        ({"CC": "false"}, "recurrent.c could not be built: "),
    ],
)
def test_without_a_compiler_plain_pytorch_serves_and_says_so_once(environment, reason, tmp_path):
    lines = run(DECODE, GDN_CACHE_DIR=str(tmp_path), **environment).splitlines()
    said = [line for line in lines if reason in line]
    assert len(said) == 1
    assert said[0].startswith("recurrent_: runs in plain PyTorch: ")
    assert float(lines[-1]) == pytest.approx(64 * 8**-0.5, rel=1e-6)


def test_what_was_built_once_serves_the_next_process(tmp_path):
    run(DECODE, GDN_CACHE_DIR=str(tmp_path))
    (library,) = tmp_path.iterdir()
    built = library.stat().st_mtime_ns
    run(DECODE, GDN_CACHE_DIR=str(tmp_path))
    assert library.stat().st_mtime_ns == built
    assert [*tmp_path.iterdir()] == [library]


def test_a_kept_library_that_cannot_be_loaded_is_built_again(tmp_path):
    run(DECODE, GDN_CACHE_DIR=str(tmp_path))
    (library,) = tmp_path.iterdir()
    library.write_bytes(b"no library")
    lines = run(DECODE, GDN_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 1
    assert library.stat().st_size > 10_000


def test_where_nothing_can_be_kept_the_c_serves_all_the_same(tmp_path):
    (tmp_path / "file").write_text("")
    lines = run(DECODE, GDN_CACHE_DIR=str(tmp_path / "file" / "folder")).splitlines()
    assert len(lines) == 1


def test_plain_pytorch_can_be_asked_for(served, monkeypatch):
    monkeypatch.setenv("GDN_PLAIN_CPU", "1")
    gdn_ops.recurrent_(*make_inputs(1, 1, 1, 2, 16, 16), make_state(1, 2, 16, 16))
    assert not served

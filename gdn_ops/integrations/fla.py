"""The operators with the arguments of Flash Linear Attention (FLA, ``fla-core`` 0.6).

Model code that imports ``chunk_gated_delta_rule`` or ``fused_recurrent_gated_delta_rule`` from
``fla.ops.gated_delta_rule`` changes that import and nothing else: names, order and defaults of the
arguments are FLA's, and so is the layout of the state, ``[N, HV, K, V]`` unless ``state_v_first``.

Source: fla-core 0.6.0, ``fla/ops/gated_delta_rule``; tests/test_fla.py feeds both the same call.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from gdn_ops._checks import arithmetic_dtype, check_shape
from gdn_ops.chunk import chunk
from gdn_ops.gate import gdn_gate
from gdn_ops.recurrent import recurrent


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``gdn_ops.chunk`` as FLA spells it.

    Args:
        q: Queries, ``[B, T, H, K]``.
        k: Keys, ``[B, T, H, K]``, dtype of ``q``.
        v: Values, ``[B, T, HV, V]``, dtype of ``q``.
        g: Log decay, ``[B, T, HV]``, any floating dtype, used as float32; with
            ``use_gate_in_kernel`` the raw projection.
        beta: Write strength, ``[B, T, HV]``, any floating dtype, used as float32.
        scale: Query scale. Default: ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, or ``[N, HV, V, K]`` with ``state_v_first``; used as
            float32. Default: zeros.
        output_final_state: Return the final state instead of None.
        use_qk_l2norm_in_kernel: Normalise ``q`` and ``k``.
        use_beta_sigmoid_in_kernel: ``beta`` is given before its sigmoid.
        allow_neg_eigval: Double ``beta`` after the sigmoid; needs ``use_beta_sigmoid_in_kernel``.
        state_v_first: Layout of both states, ``[V, K]`` instead of ``[K, V]``.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``.
        cu_seqlens_cpu: Not used: a copy that spares FLA a synchronisation with the host.
        chunk_indices: Not used: FLA's tables of ``cu_seqlens``, computed ahead.
        cp_context: Must be None: context parallelism is not offered.
        **kwargs: ``use_gate_in_kernel`` with ``A_log`` and ``dt_bias`` (``[HV]``): ``g`` is given
            before its gate. ``chunk_size``: 16, 32 or 64, which cannot change the result but by
            rounding, so it is not used. ``transpose_state_layout``: the old name of
            ``state_v_first``. Others are ignored, as FLA ignores them.

    Returns:
        o: ``[B, T, HV, V]``, dtype of ``q``.
        final_state: float32, a new contiguous tensor in the layout of ``initial_state``, or None.

    Raises:
        ValueError: an argument breaks a rule above or the table in ``gdn_ops/README.md``.
        NotImplementedError: ``cp_context`` is given.

    Source: fla-core 0.6.0, chunk.py; tests/test_fla.py.
    """
    op = "chunk_gated_delta_rule"
    if cp_context is not None:
        raise NotImplementedError(f"{op}: cp_context must be None, context parallelism is absent")
    chunk_size = kwargs.get("chunk_size", 64)
    if chunk_size not in (16, 32, 64):
        raise ValueError(f"{op}: chunk_size must be 16, 32 or 64, got {chunk_size}")
    v_first = _state_v_first(op, state_v_first, kwargs)
    decay = _decay(op, g, q, kwargs)
    strength = _write_strength(op, beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    o, final_state = chunk(
        q,
        k,
        v,
        decay,
        strength,
        _as_v_first(initial_state, q, v_first),
        cu_seqlens,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o, _as_asked(final_state, v_first) if output_final_state else None


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``gdn_ops.recurrent`` as FLA spells it; differentiable, which FLA's is not.

    Args:
        q: Queries, ``[B, T, H, K]``.
        k: Keys, ``[B, T, H, K]``, dtype of ``q``.
        v: Values, ``[B, T, HV, V]``, dtype of ``q``.
        g: Log decay, ``[B, T, HV]``, any floating dtype, used as float32; with
            ``use_gate_in_kernel`` the raw projection. Default: no decay.
        gk: Log decay per key channel, ``[B, T, HV, K]``, added to ``g``. Default: none.
        gv: Must be None: a decay per value channel is not offered.
        beta: Write strength, ``[B, T, HV]``, any floating dtype, used as float32. Default: ones.
        scale: Query scale. Default: ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, or ``[N, HV, V, K]`` with ``state_v_first``; used as
            float32. Default: zeros.
        output_final_state: Return the final state instead of None.
        use_qk_l2norm_in_kernel: Normalise ``q`` and ``k``.
        use_gate_in_kernel: ``g`` is given before its gate; needs ``A_log``.
        A_log: Logarithm of the decay rate, ``[HV]``; read with ``use_gate_in_kernel`` only.
        dt_bias: Bias of ``g`` before its gate, ``[HV]``; read with ``use_gate_in_kernel`` only.
            Default: zeros.
        use_beta_sigmoid_in_kernel: ``beta`` is given before its sigmoid.
        allow_neg_eigval: Double ``beta`` after the sigmoid; needs ``use_beta_sigmoid_in_kernel``.
        state_v_first: Layout of both states, ``[V, K]`` instead of ``[K, V]``.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``.
        **kwargs: ``transpose_state_layout``: the old name of ``state_v_first``. Others are
            ignored, as FLA ignores them.

    Returns:
        o: ``[B, T, HV, V]``, dtype of ``q``.
        final_state: float32, a new contiguous tensor in the layout of ``initial_state``, or None.

    Raises:
        ValueError: an argument breaks a rule above or the table in ``gdn_ops/README.md``.
        NotImplementedError: ``gv`` is given, or ``beta`` per value channel.

    Source: fla-core 0.6.0, fused_recurrent.py; tests/test_fla.py.
    """
    op = "fused_recurrent_gated_delta_rule"
    if gv is not None:
        raise NotImplementedError(f"{op}: gv must be None, a decay per value channel is absent")
    v_first = _state_v_first(op, state_v_first, kwargs)
    gate = {"use_gate_in_kernel": use_gate_in_kernel, "A_log": A_log, "dt_bias": dt_bias}
    decay = _decay(op, g, q, gate)
    if gk is not None:
        per_channel = gk.to(arithmetic_dtype(q.dtype))
        decay = per_channel if decay is None else decay.unsqueeze(-1) + per_channel
    strength = _write_strength(op, beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    o, final_state = recurrent(
        q,
        k,
        v,
        decay,
        strength,
        _as_v_first(initial_state, q, v_first),
        cu_seqlens,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o, _as_asked(final_state, v_first) if output_final_state else None


def _state_v_first(op: str, state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """The layout of the state, by its name of today or the old one."""
    if "head_first" in kwargs:
        raise ValueError(f"{op}: head_first must not be given, tensors are [B, T, H, ...]")
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError(f"{op}: transpose_state_layout must not be given beside state_v_first")
    warnings.warn(
        f"{op}: transpose_state_layout is now called state_v_first",
        DeprecationWarning,
        stacklevel=3,
    )
    return bool(kwargs["transpose_state_layout"])


def _decay(op: str, g: Tensor | None, q: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """``g`` after its gate, in the dtype of the arithmetic."""
    dtype = arithmetic_dtype(q.dtype)
    if not kwargs.get("use_gate_in_kernel", False):
        return None if g is None else g.to(dtype)
    A_log, dt_bias = kwargs.get("A_log"), kwargs.get("dt_bias")
    if g is None:
        raise ValueError(f"{op}: g must be given with use_gate_in_kernel, got None")
    if A_log is None:
        raise ValueError(f"{op}: A_log must be given with use_gate_in_kernel, got None")
    if dt_bias is None:
        dt_bias = torch.zeros_like(A_log)
    return gdn_gate(g.to(dtype), A_log, dt_bias)


def _write_strength(
    op: str, beta: Tensor | None, v: Tensor, use_sigmoid: bool, allow_neg_eigval: bool
) -> Tensor | None:
    """``beta`` after its sigmoid, in the dtype of the arithmetic."""
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError(
            f"{op}: allow_neg_eigval must be False without use_beta_sigmoid_in_kernel, got True"
        )
    if beta is None:
        if use_sigmoid:
            raise ValueError(f"{op}: beta must be given with use_beta_sigmoid_in_kernel, got None")
        return None
    if beta.dim() == v.dim():
        raise NotImplementedError(
            f"{op}: beta must have shape [B, T, HV], a write strength per value channel is absent"
        )
    check_shape(op, "beta", beta, "[B, T, HV]", tuple(v.shape[:3]))
    beta = beta.to(arithmetic_dtype(v.dtype))
    if not use_sigmoid:
        return beta
    return 2 * beta.sigmoid() if allow_neg_eigval else beta.sigmoid()


def _as_v_first(state: Tensor | None, q: Tensor, v_first: bool) -> Tensor | None:
    if state is None:
        return None
    state = state.to(arithmetic_dtype(q.dtype))
    return state if v_first else state.transpose(-1, -2)


def _as_asked(state: Tensor, v_first: bool) -> Tensor:
    return state if v_first else state.transpose(-1, -2).contiguous()

"""The operators as loops over tokens, from the formulas alone. Shares nothing with the package.

    S <- exp(g_t) S,  u = beta_t (v_t - S k_t),  S <- S + u k_t^T,  o_t = scale S q_t

Every function computes in ``dtype``: float64 is the exact answer, float32 the plain operator whose
error sets the tolerances (``tolerance.py``). Nothing is rounded before it is returned. Autograd
through these loops is the oracle of the gradients. Everything runs on the CPU.
"""

import itertools

import torch

EXACT = torch.float64


def _spans(batch, tokens, cu_seqlens):
    """The batch row and the tokens of every sequence."""
    if cu_seqlens is None:
        return [(row, slice(0, tokens)) for row in range(batch)]
    return [(0, slice(a, b)) for a, b in itertools.pairwise(cu_seqlens.tolist())]


def _normalize(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _prepare(q, k, v, g, beta, scale, use_qk_l2norm, dtype):
    """Defaults filled in, one query and one key for every value head, all in ``dtype``."""
    q, k, v = (x.cpu().to(dtype) for x in (q, k, v))
    if use_qk_l2norm:
        q, k = _normalize(q), _normalize(k)
    value_heads = v.shape[2]
    key_head = [head // (value_heads // q.shape[2]) for head in range(value_heads)]
    q = q[:, :, key_head] * (q.shape[-1] ** -0.5 if scale is None else scale)
    k = k[:, :, key_head]
    g = v.new_zeros(v.shape[:3]) if g is None else g.cpu().to(dtype)
    beta = v.new_ones(v.shape[:3]) if beta is None else beta.cpu().to(dtype)
    # A decay of every key dimension, which is the same number K times where the head has one decay.
    decay = (g if g.dim() == 4 else g[..., None]).exp()
    return q, k, v, decay, beta


def _states(tokens, row, span, state, operands):
    """Yield the output of each token of one sequence, and the state after it, ``[HV, V, K]``.

    ``operands`` is the dtype to which a product rounds its operands; None: to none.
    """

    def operand(x):
        return x if operands is None else x.to(operands).to(x.dtype)

    q, k, v, decay, beta = (x[row, span] for x in tokens)
    for t in range(q.shape[0]):
        key = k[t][:, None, :]  # [HV, 1, K]
        state = decay[t][:, None, :] * state
        error = v[t] - (operand(state) * key).sum(-1)  # [HV, V]
        delta = operand(beta[t])[:, None] * operand(error)
        state = state + operand(delta)[:, :, None] * key
        yield (operand(state) * q[t][:, None, :]).sum(-1), state


def _place(outputs, batch, tokens, width, dtype):
    """``[B, T, *width]`` from ``outputs``, a dict (batch row, token) -> row; else zero."""
    zero = torch.zeros(width, dtype=dtype)
    return torch.stack(
        [torch.stack([outputs.get((b, t), zero) for t in range(tokens)]) for b in range(batch)]
    )


def delta_rule(
    q,
    k,
    v,
    g=None,
    beta=None,
    initial_state=None,
    cu_seqlens=None,
    *,
    scale=None,
    use_qk_l2norm=False,
    operands=None,
    dtype=EXACT,
):
    """What ``chunk`` and ``recurrent`` compute: ``o``, ``final_state [N, HV, V, K]``."""
    tokens = _prepare(q, k, v, g, beta, scale, use_qk_l2norm, dtype)
    batch, length, value_heads, value_size = v.shape
    outputs, finals = {}, []
    for n, (row, span) in enumerate(_spans(batch, length, cu_seqlens)):
        if initial_state is None:
            state = torch.zeros(value_heads, value_size, q.shape[-1], dtype=dtype)
        else:
            state = initial_state[n].cpu().to(dtype)
        for t, (output, after) in enumerate(
            _states(tokens, row, span, state, operands), span.start
        ):
            outputs[row, t] = output
            state = after
        finals.append(state)
    o = _place(outputs, batch, length, (value_heads, value_size), dtype)
    return o, torch.stack(finals)


def delta_rule_into_pool(
    q,
    k,
    v,
    g,
    beta,
    pool,
    state_indices=None,
    num_accepted_tokens=None,
    cu_seqlens=None,
    read_indices=None,
    *,
    has_initial_state=None,
    scale=None,
    use_qk_l2norm=False,
    null_index=-1,
    operands=None,
    dtype=EXACT,
):
    """What ``chunk_`` and ``recurrent_`` compute: the outputs, and the pool after them, a copy.

    ``state_indices`` is one slot a row, or a table with a slot for each of the row's tokens.
    """
    tokens = _prepare(q, k, v, g, beta, scale, use_qk_l2norm, dtype)
    batch, length, value_heads, value_size = v.shape
    pool = pool.detach().cpu().to(dtype)
    after_call = pool.clone()
    outputs = {}
    for n, (row, span) in enumerate(_spans(batch, length, cu_seqlens)):
        count = span.stop - span.start
        slots = n if state_indices is None else state_indices[n].tolist()
        if isinstance(slots, int):
            read = slots
            # The only slot of the row holds the state after its last token.
            writes = {count - 1: slots}
            padding = slots <= null_index
        else:
            accepted = 1 if num_accepted_tokens is None else int(num_accepted_tokens[n])
            padding = not 1 <= accepted <= len(slots) or count > len(slots)
            read = null_index if padding else slots[accepted - 1]
            writes = {t: slot for t, slot in enumerate(slots[:count]) if slot > null_index}
        if read_indices is not None:
            read = int(read_indices[n])
        if padding or read <= null_index:
            continue
        state = pool[read]
        if has_initial_state is not None and not has_initial_state[n]:
            state = torch.zeros_like(state)
        for t, (output, after) in enumerate(_states(tokens, row, span, state, operands)):
            outputs[row, span.start + t] = output
            if t in writes:
                after_call[writes[t]] = after
    return _place(outputs, batch, length, (value_heads, value_size), dtype), after_call


def _convolve(columns, weight, bias, count, activation):
    """Yield ``y [D]`` of ``count`` tokens from ``columns [D, W - 1 + count]``, history first."""
    for t in range(count):
        y = (columns[:, t : t + weight.shape[1]] * weight).sum(1)
        y = y if bias is None else y + bias
        yield y * torch.sigmoid(y) if activation == "silu" else y


def convolution(
    x, weight, bias=None, initial_state=None, cu_seqlens=None, *, activation=None, dtype=EXACT
):
    """What ``causal_conv1d`` computes: ``y [B, T, D]``, ``final_state [N, D, W - 1]``."""
    batch, length, channels = x.shape
    x, weight = x.cpu().to(dtype), weight.cpu().to(dtype)
    bias = None if bias is None else bias.cpu().to(dtype)
    outputs, finals = {}, []
    for n, (row, span) in enumerate(_spans(batch, length, cu_seqlens)):
        if initial_state is None:
            history = torch.zeros(channels, weight.shape[1] - 1, dtype=dtype)
        else:
            history = initial_state[n].cpu().to(dtype)
        columns = torch.cat([history, x[row, span].T], 1)
        count = span.stop - span.start
        for t, y in enumerate(_convolve(columns, weight, bias, count, activation), span.start):
            outputs[row, t] = y
        finals.append(columns[:, count:])
    return _place(outputs, batch, length, (channels,), dtype), torch.stack(finals)


def convolution_into_pool(
    x,
    weight,
    bias,
    pool,
    state_indices=None,
    num_accepted_tokens=None,
    cu_seqlens=None,
    *,
    activation=None,
    null_index=-1,
    dtype=EXACT,
):
    """What ``causal_conv1d_`` computes: the outputs, and the pool afterwards, a new tensor.

    With accepted counts the history starts at column ``accepted - 1``, and the inputs that came in
    are kept from column ``W - 2`` on, so that the next call can go back behind any of them.
    """
    batch, length, channels = x.shape
    x, weight = x.cpu().to(dtype), weight.cpu().to(dtype)
    bias = None if bias is None else bias.cpu().to(dtype)
    pool = pool.detach().cpu().to(dtype)
    after_call = pool.clone()
    width = weight.shape[1]
    outputs = {}
    for n, (row, span) in enumerate(_spans(batch, length, cu_seqlens)):
        count = span.stop - span.start
        slot = n if state_indices is None else int(state_indices[n])
        accepted = 1 if num_accepted_tokens is None else int(num_accepted_tokens[n])
        if slot <= null_index or not 1 <= accepted <= pool.shape[2] - (width - 1) + 1:
            continue
        before = pool[slot]
        columns = torch.cat([before[:, accepted - 1 : accepted + width - 2], x[row, span].T], 1)
        for t, y in enumerate(_convolve(columns, weight, bias, count, activation), span.start):
            outputs[row, t] = y
        if num_accepted_tokens is None:
            after_call[slot, :, : width - 1] = columns[:, count:]
        elif count:
            after_call[slot, :, : width - 2] = before[:, accepted : accepted + width - 2]
            after_call[slot, :, width - 2 : width - 2 + count] = x[row, span].T
    return _place(outputs, batch, length, (channels,), dtype), after_call

"""Triton kernels that walk one (sequence, head) through time with its state in registers; see `triton_scan`.

Importing this module imports triton. All arithmetic is in float32, whatever type the inputs have. A state buffer
[B, T + 1, H, n] has the state before the first token in slot 0, so that h_{t-1} is always slot t. Sizes are padded to
powers of two with zeros, which every step leaves zero.

`tl.range(num_stages=...)` lets the loads of later tokens start before they are needed: the walk waits for its own
arithmetic, not for memory.
"""

# no `from __future__ import annotations`: triton reads the annotations
# pyright: reportOperatorIssue=false, reportIndexIssue=false
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]


@triton.jit
def _first_token(row, T, H):
    """Number of a row's first token among [B, T, H] for row = sequence * H + head."""
    return (row // H) * T * H + row % H


@triton.jit(do_not_specialize=["T", "H"])
def dense_forward(M, b, states, T, H, n: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr):
    """h_t = M_t h_{t-1} + b_t."""
    row = tl.program_id(0).to(tl.int64)
    stride = tl.cast(H, tl.int64)
    i = tl.arange(0, N)
    inside = i < n
    inside_matrix = inside[:, None] & inside[None, :]
    first = _first_token(row, T, stride)
    M_at = M + first * (n * n) + i[:, None] * n + i[None, :]
    b_at = b + first * n + i
    h_at = states + _first_token(row, T + 1, stride) * n + i
    h = tl.load(h_at, mask=inside, other=0.0)
    for t in tl.range(0, T, num_stages=STAGES):
        token = t * stride
        m = tl.load(M_at + token * (n * n), mask=inside_matrix, other=0.0).to(tl.float32)
        drive = tl.load(b_at + token * n, mask=inside, other=0.0).to(tl.float32)
        h = tl.sum(m * h[None, :], 1) + drive
        tl.store(h_at + (token + stride) * n, h, mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def dense_backward(M, states, grad, dM, db, dh0, T, H, n: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr):
    """g_t = grad_t + M_{t+1}^T g_{t+1}; dM_t = g_t h_{t-1}^T; db_t = g_t; dh_0 = M_1^T g_1."""
    row = tl.program_id(0).to(tl.int64)
    stride = tl.cast(H, tl.int64)
    i = tl.arange(0, N)
    inside = i < n
    inside_matrix = inside[:, None] & inside[None, :]
    first = _first_token(row, T, stride)
    in_matrix = first * (n * n) + i[:, None] * n + i[None, :]
    in_vector = first * n + i
    h_at = states + _first_token(row, T + 1, stride) * n + i
    carry = tl.zeros((N,), tl.float32)
    for back in tl.range(0, T, num_stages=STAGES):
        token = (T - 1 - back) * stride
        m = tl.load(M + in_matrix + token * (n * n), mask=inside_matrix, other=0.0).to(tl.float32)
        h = tl.load(h_at + token * n, mask=inside, other=0.0)
        g = tl.load(grad + in_vector + token * n, mask=inside, other=0.0) + carry
        tl.store(db + in_vector + token * n, g, mask=inside)
        tl.store(dM + in_matrix + token * (n * n), g[:, None] * h[None, :], mask=inside_matrix)
        carry = tl.sum(m * g[:, None], 0)
    tl.store(dh0 + row * n + i, carry, mask=inside)


@triton.jit
def _reflections(i, k, size: tl.constexpr, count: tl.constexpr):
    """Where the 2 count reflections lie in [2, size, count, size], in their order: R (factor 1) first, then L (0).

    Block i of R holds for row i of the grid, block k of L for column k. Returns tuples of the vectors' and the gates'
    offsets on the grid [ROWS, COLUMNS].
    """
    vectors, gates = (), ()
    for r in tl.static_range(count):
        gates += ((size + i) * count + r + 0 * k,)
        vectors += (((size + i) * count + r) * size + k,)
    for r in tl.static_range(count):
        gates += (k * count + r + 0 * i,)
        vectors += ((k * count + r) * size + i,)
    return vectors, gates


@triton.jit(do_not_specialize=["T", "H", "unit"])
def monarch_forward(
    u, beta, forget, b, states, T, H, unit,
    size: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, count: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h_t = forget_t P^T L_t P R_t h_{t-1} + b_t, every block of R and L `count` reflections I - beta u u^T.

    The state is a grid [size, size]. Blocks of R reflect its rows and those of L its columns, so a reflection is a sum
    along axis 1 or 0 of the grid: no block is ever formed and nothing is transposed.

    `unit` is 1, which the compiler must not know. It would see that R and L lie in memory along different axes, give
    them different layouts in registers, and exchange registers between lanes at every token while the walk waits.
    """
    row = tl.program_id(0).to(tl.int64)
    stride = tl.cast(H, tl.int64)
    first = _first_token(row, T, stride)
    i, k = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (i < size) & (k < size)
    cell = i * unit * size + k * unit
    vectors, gates = _reflections(i * unit, k * unit, size, count)
    n: tl.constexpr = size * size
    everywhere = tl.zeros((ROWS, COLUMNS), tl.int32)
    h_at = states + _first_token(row, T + 1, stride) * n + cell
    h = tl.load(h_at, mask=inside, other=0.0)
    for t in tl.range(0, T, num_stages=STAGES):
        token = first + t * stride
        for r in tl.static_range(2 * count):
            v = tl.load(u + token * (2 * n * count) + vectors[r], mask=inside, other=0.0).to(tl.float32)
            w = tl.load(beta + token * (2 * size * count) + gates[r], mask=inside, other=0.0).to(tl.float32)
            h -= (w * v) * tl.sum(v * h, 1 - r // count, keep_dims=True)
        kept = tl.load(forget + token + everywhere).to(tl.float32)
        drive = tl.load(b + token * n + cell, mask=inside, other=0.0).to(tl.float32)
        h = kept * h + drive
        tl.store(h_at + (t + 1) * stride * n, h, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "unit"])
def monarch_backward(
    u, beta, forget, states, grad, du, dbeta, dforget, db, dh0, T, H, unit,
    size: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, count: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Gradients of `monarch_forward`, last token first.

    A token's reflections are repeated from h_{t-1}, which the walk does not wait for. For y = x - beta u (u . x) and a
    gradient g of y: dbeta = -(u . x)(u . g), du = -beta ((u . g) x + (u . x) g), and g - beta u (u . g) goes on to x.
    """
    row = tl.program_id(0).to(tl.int64)
    stride = tl.cast(H, tl.int64)
    first = _first_token(row, T, stride)
    i, k = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (i < size) & (k < size)
    cell = i * unit * size + k * unit
    vectors, gates = _reflections(i * unit, k * unit, size, count)
    n: tl.constexpr = size * size
    everywhere = tl.zeros((ROWS, COLUMNS), tl.int32)
    h_at = states + _first_token(row, T + 1, stride) * n + cell
    carry = tl.zeros((ROWS, COLUMNS), tl.float32)
    for back in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - back
        token = first + t * stride
        u_token, beta_token = token * (2 * n * count), token * (2 * size * count)
        x = tl.load(h_at + t * stride * n, mask=inside, other=0.0)
        xs, vs, ws, dots = (), (), (), ()
        for r in tl.static_range(2 * count):
            v = tl.load(u + u_token + vectors[r], mask=inside, other=0.0).to(tl.float32)
            w = tl.load(beta + beta_token + gates[r], mask=inside, other=0.0).to(tl.float32)
            dot = tl.sum(v * x, 1 - r // count, keep_dims=True)
            xs += (x,)
            vs += (v,)
            ws += (w,)
            dots += (dot,)
            x -= (w * v) * dot
        kept = tl.load(forget + token + everywhere).to(tl.float32)
        g = tl.load(grad + token * n + cell, mask=inside, other=0.0) + carry
        tl.store(db + token * n + cell, g, mask=inside)
        dkept = tl.sum(tl.sum(g * x, 1, keep_dims=True), 0, keep_dims=True)
        tl.store(dforget + token + everywhere, tl.broadcast_to(dkept, (ROWS, COLUMNS)), mask=(i == 0) & (k == 0))
        g = kept * g
        for r in tl.static_range(2 * count - 1, -1, -1):
            dot = tl.sum(vs[r] * g, 1 - r // count, keep_dims=True)
            once = inside & ((k == 0) if r < count else (i == 0))
            tl.store(dbeta + beta_token + gates[r], tl.broadcast_to(-dots[r] * dot, (ROWS, COLUMNS)), mask=once)
            tl.store(du + u_token + vectors[r], -ws[r] * (dot * xs[r] + dots[r] * g), mask=inside)
            g -= (ws[r] * vs[r]) * dot
        carry = g
    tl.store(dh0 + row * n + cell, carry, mask=inside)

"""Triton kernels of the fused coupling stack. Requires triton; only triton_coupling.py imports this module.

Notation
    B, M     numbers of frames, of points per frame; a program has BM points of one frame, `points` are their row
             indices among the B M rows
    W, D     width of the hidden layers, number of W x W matrices per coupling layer; L number of coupling layers
    e        code of the kept coordinates: identity, sines, cosines, a column of ones, padding            (BM, CODE)
    h_0..h_D hidden activations after the first matrix and after each of the D hidden matrices            (BM, W)
    g_j      gradient before the activation of h_(j+1); hidden matrix j has the gradient sum g_j h_j^T    (BM, W)
    s, o     log-scale and offset of the changed coordinate                                               (BM,)
    gs, go   gradients of s and o                                                                         (BM,)
    stride   numbers from one array h_j (or g_j) to the next; each has B M rows of W numbers
Weights of one coupling layer: first (W, CODE), with its bias in the column of ones; hidden (D, W, W); bias (B, D, W),
per frame because hidden matrix 0 also receives the frame's latent; last (2, W) and last_bias (2,). Matrices are stored
as in PyTorch, (out, in).
W x W products are computed with BN columns of one operand at a time, so a whole matrix never has to fit on the chip.
Every such group of columns of a larger array is called `piece`. Weight gradients are computed in tiles of BW x BW
entries, BK points at a time.
"""

import triton
import triton.language as tl

from models.kernels import constants

SLOPE = tl.constexpr(constants.NEGATIVE_SLOPE)
S_MAX = tl.constexpr(constants.S_MAX)


@triton.jit
def _leaky(v, slope):
    return tl.where(v > 0, v, v * slope)


@triton.jit
def _slope_of(h, slope):
    """Derivative of a LeakyReLU, from its output h: 1 or `slope`."""
    return tl.where(h.to(tl.float32) > 0, 1.0, slope)


@triton.jit
def _dot(a, b, total, PRODUCT: tl.constexpr):
    """total + a b. With "ieee", operands are converted to float32: Triton's interpreter has no bf16 product."""
    if PRODUCT == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRODUCT)


@triton.jit
def _is_of_first_coordinate(OCTAVES: tl.constexpr, CODE: tl.constexpr):
    """Mask `(CODE,)` of the code columns that are computed from the first kept coordinate."""
    column = tl.arange(0, CODE)
    return (column == 0) | ((column >= 2) & (column < 2 + 2 * OCTAVES))


@triton.jit
def _code(a0, a1, DERIVATIVE: tl.constexpr, OCTAVES: tl.constexpr, CODE: tl.constexpr):
    """Code e `(BM, CODE)` of kept coordinates a0, a1 `(BM,)`, or its derivative if DERIVATIVE. Angles are in turns (2
    pi radians): a coordinate times a power of two, so subtracting whole turns is exact."""
    column = tl.arange(0, CODE)
    wave = tl.maximum(column - 2, 0)
    quarters = (wave // OCTAVES) % 2 + DERIVATIVE  # cos v = sin(v + 1/4 turn); a derivative adds 1/4 turn
    half_frequency = tl.exp2((wave % OCTAVES - 1).to(tl.float32))  # turns per unit
    v = tl.where(_is_of_first_coordinate(OCTAVES, CODE)[None, :], a0[:, None], a1[:, None])
    turns = v * half_frequency[None, :]
    turns = turns - tl.floor(turns + 0.5) + 0.25 * quarters[None, :]
    waves = tl.sin(6.283185307179586 * turns)
    if DERIVATIVE:
        waves *= 6.283185307179586 * half_frequency[None, :]
    identity = 1.0 if DERIVATIVE else v
    ones = 0.0 if DERIVATIVE else tl.where(column == 2 + 4 * OCTAVES, 1.0, 0.0)[None, :]
    return tl.where(column[None, :] < 2, identity, tl.where(column[None, :] < 2 + 4 * OCTAVES, waves, ones))


@triton.jit
def _scale_offset(e, first, hidden, bias, last, last_bias, h, stride, points, inside, first_slope, KEEP: tl.constexpr,
                  D: tl.constexpr, CODE: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  PRODUCT: tl.constexpr):
    """s (not clamped) and o of one layer, `(BM,)` each. With KEEP, rows `points` of every h_j are written to `h`.
    Without KEEP, only the activations between hidden matrices 1 and D - 1 are written (none for D <= 2)."""
    operand = hidden.dtype.element_ty
    n = tl.arange(0, BN)
    c = tl.arange(0, CODE)
    w = tl.arange(0, W)
    row = points[:, None] * W
    mask = inside[:, None]
    total = tl.zeros((BM, W), tl.float32)
    for start in range(0, W, BN):
        columns = start + n
        weight = tl.load(first + columns[None, :] * CODE + c[:, None])  # (CODE, BN)
        piece = tl.dot(e, weight, input_precision="ieee" if PRODUCT == "ieee" else "tf32x3")
        piece = _leaky(piece, first_slope).to(operand)
        if KEEP:
            tl.store(h + row + columns[None, :], piece, mask)
        weight = tl.load(hidden + w[None, :] * W + columns[:, None])  # (BN, W)
        total = _dot(piece, weight, total, PRODUCT)
    value = _leaky(total + tl.load(bias + w)[None, :], SLOPE)
    if KEEP:
        tl.store(h + stride + row + w[None, :], value.to(operand), mask)
    for j in tl.static_range(1, D - 1):
        for start in range(0, W, BN):
            columns = start + n
            weight = tl.load(hidden + j * W * W + columns[None, :] * W + w[:, None])  # (W, BN)
            piece = _dot(value.to(operand), weight, tl.zeros((BM, BN), tl.float32), PRODUCT)
            piece = _leaky(piece + tl.load(bias + j * W + columns)[None, :], SLOPE)
            tl.store(h + (j + 1) * stride + row + columns[None, :], piece.to(operand), mask)
        tl.debug_barrier()
        value = tl.load(h + (j + 1) * stride + row + w[None, :], mask, other=0.0).to(tl.float32)
        tl.debug_barrier()
    s = tl.load(last_bias) + tl.zeros((BM,), tl.float32)
    o = tl.load(last_bias + 1) + tl.zeros((BM,), tl.float32)
    if D == 1:
        s += tl.sum(value * tl.load(last + w)[None, :], 1)
        o += tl.sum(value * tl.load(last + W + w)[None, :], 1)
    else:
        for start in range(0, W, BN):
            columns = start + n
            weight = tl.load(hidden + (D - 1) * W * W + columns[None, :] * W + w[:, None])  # (W, BN)
            piece = _dot(value.to(operand), weight, tl.zeros((BM, BN), tl.float32), PRODUCT)
            piece = _leaky(piece + tl.load(bias + (D - 1) * W + columns)[None, :], SLOPE)
            if KEEP:
                tl.store(h + D * stride + row + columns[None, :], piece.to(operand), mask)
            s += tl.sum(piece * tl.load(last + columns)[None, :], 1)
            o += tl.sum(piece * tl.load(last + W + columns)[None, :], 1)
    return s, o


@triton.jit(do_not_specialize=["coordinates"])
def stack_kernel(x, y, coordinates, first, hidden, bias, last, last_bias, h, M, L, B, first_slope,
                 INVERSE: tl.constexpr, D: tl.constexpr, OCTAVES: tl.constexpr, CODE: tl.constexpr, W: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, PRODUCT: tl.constexpr):
    """Forward pass of all layers for BM points of one frame. x, y: input and output `(B, M, 3)`. `coordinates`: changed
    coordinate of each layer, two bits per layer, layer 0 in the lowest bits. h: scratch memory, `(BM, W)` per program,
    used if D > 2. Grid: (tiles of points, frames)."""
    frame = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < M
    at = (frame * M + rows) * 3
    x0 = tl.load(x + at, inside, other=0.0)
    x1 = tl.load(x + at + 1, inside, other=0.0)
    x2 = tl.load(x + at + 2, inside, other=0.0)
    scratch_rows = (frame * tl.num_programs(0) + tl.program_id(0)) * BM + tl.arange(0, BM)
    for step in range(L):
        k = step
        if INVERSE:
            k = L - 1 - step
        c = (coordinates >> 2 * k) & 3
        v = tl.where(c == 0, x0, tl.where(c == 1, x1, x2))
        e = _code(tl.where(c == 0, x1, x0), tl.where(c == 2, x1, x2), False, OCTAVES, CODE)
        s, o = _scale_offset(e, first + k * W * CODE, hidden + k * D * W * W, bias + (k * B + frame) * D * W,
                             last + k * 2 * W, last_bias + k * 2, h, 0, scratch_rows, inside, first_slope, False, D,
                             CODE, W, BM, BN, PRODUCT)
        s = tl.minimum(tl.maximum(s, -S_MAX), S_MAX)
        if INVERSE:
            v = v * tl.exp(s) + o
        else:
            v = (v - o) * tl.exp(-s)
        x0 = tl.where(c == 0, v, x0)
        x1 = tl.where(c == 1, v, x1)
        x2 = tl.where(c == 2, v, x2)
    tl.store(y + at, x0, inside)
    tl.store(y + at + 1, x1, inside)
    tl.store(y + at + 2, x2, inside)


@triton.jit
def _hidden_backward(gs, go, hidden, last, h, g, sums, stride, points, inside, D: tl.constexpr, W: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, PRODUCT: tl.constexpr):
    """Backward pass from the gradients gs, go `(BM,)` of s and o to g_(D-1), ..., g_0, which are written to `g`.

    Also writes sums over the points of this program to `sums`: rows 0..D-1 sums of g_j (bias gradients), rows D and
    D + 1 the gradient of the last matrix."""
    operand = hidden.dtype.element_ty
    n = tl.arange(0, BN)
    w = tl.arange(0, W)
    row = points[:, None] * W
    mask = inside[:, None]
    for start in range(0, W, BN):
        columns = start + n
        piece = tl.load(h + D * stride + row + columns[None, :], mask, other=0.0).to(tl.float32)
        tl.store(sums + D * W + columns, tl.sum(gs[:, None] * piece, 0))
        tl.store(sums + (D + 1) * W + columns, tl.sum(go[:, None] * piece, 0))
        piece_s = gs[:, None] * tl.load(last + columns)[None, :]
        piece_o = go[:, None] * tl.load(last + W + columns)[None, :]
        gradient = (piece_s + piece_o) * _slope_of(piece, SLOPE)
        tl.store(sums + (D - 1) * W + columns, tl.sum(gradient, 0))
        tl.store(g + (D - 1) * stride + row + columns[None, :], gradient.to(operand), mask)
    tl.debug_barrier()
    for step in tl.static_range(1, D):
        j = D - step
        total = tl.zeros((BM, W), tl.float32)
        for start in range(0, W, BN):
            columns = start + n
            piece = tl.load(g + j * stride + row + columns[None, :], mask, other=0.0)
            weight = tl.load(hidden + j * W * W + columns[:, None] * W + w[None, :])  # (BN, W)
            total = _dot(piece, weight, total, PRODUCT)
        total *= _slope_of(tl.load(h + j * stride + row + w[None, :], mask, other=0.0), SLOPE)
        tl.store(sums + (j - 1) * W + w, tl.sum(total, 0))
        tl.store(g + (j - 1) * stride + row + w[None, :], total.to(operand), mask)
        tl.debug_barrier()


@triton.jit
def layer_backward_kernel(y, grad, first, hidden, bias, last, last_bias, h, g, sums, first_sums, last_bias_sums, M,
                          stride, first_slope, COORDINATE: tl.constexpr, INVERSE: tl.constexpr, D: tl.constexpr,
                          OCTAVES: tl.constexpr, CODE: tl.constexpr, W: tl.constexpr, BM: tl.constexpr,
                          BN: tl.constexpr, PRODUCT: tl.constexpr):
    """Backward pass of one layer, in place. y and grad `(B, M, 3)` contain the layer's output and its gradient; the
    kernel replaces them by the layer's input and its gradient.

    Writes h_j to h `(D + 1, B M, W)` and g_j to g `(D, B M, W)` for `weight_gradient_kernel`. Writes each program's
    sums over its points to sums `(programs, D + 2, W)`, first_sums `(programs, W, CODE)` and last_bias_sums
    `(programs, 2)`. Grid: (tiles of points, frames)."""
    frame = tl.program_id(1)
    program = frame * tl.num_programs(0) + tl.program_id(0)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < M
    points = frame * M + rows
    KEPT0: tl.constexpr = 1 if COORDINATE == 0 else 0
    KEPT1: tl.constexpr = 1 if COORDINATE == 2 else 2
    a0 = tl.load(y + points * 3 + KEPT0, inside, other=0.0)
    a1 = tl.load(y + points * 3 + KEPT1, inside, other=0.0)
    after = tl.load(y + points * 3 + COORDINATE, inside, other=0.0)
    g_after = tl.load(grad + points * 3 + COORDINATE, inside, other=0.0)

    e = _code(a0, a1, False, OCTAVES, CODE)
    unclamped_s, o = _scale_offset(e, first, hidden, bias + frame * D * W, last, last_bias, h, stride, points, inside,
                                   first_slope, True, D, CODE, W, BM, BN, PRODUCT)
    s = tl.minimum(tl.maximum(unclamped_s, -S_MAX), S_MAX)
    if INVERSE:  # after = before exp(s) + o
        before = (after - o) * tl.exp(-s)
        g_before = g_after * tl.exp(s)
        gs = g_before * before
        go = g_after
    else:  # after = (before - o) exp(-s)
        before = after * tl.exp(s) + o
        g_before = g_after * tl.exp(-s)
        gs = -g_after * after
        go = -g_before
    gs = tl.where(tl.abs(unclamped_s) < S_MAX, gs, 0.0)
    tl.store(last_bias_sums + program * 2, tl.sum(gs, 0))
    tl.store(last_bias_sums + program * 2 + 1, tl.sum(go, 0))
    tl.debug_barrier()
    _hidden_backward(gs, go, hidden, last, h, g, sums + program * (D + 2) * W, stride, points, inside, D, W, BM, BN,
                     PRODUCT)

    n = tl.arange(0, BN)
    c = tl.arange(0, CODE)
    w = tl.arange(0, W)
    row = points[:, None] * W
    mask = inside[:, None]
    g_0 = tl.load(g + row + w[None, :], mask, other=0.0)
    g_code = tl.zeros((BM, CODE), tl.float32)
    for start in range(0, W, BN):
        columns = start + n
        weight = tl.load(hidden + w[:, None] * W + columns[None, :])  # (W, BN)
        piece = _dot(g_0, weight, tl.zeros((BM, BN), tl.float32), PRODUCT)
        piece *= _slope_of(tl.load(h + row + columns[None, :], mask, other=0.0), first_slope)
        weight = tl.load(first + columns[:, None] * CODE + c[None, :])  # (BN, CODE)
        g_code = _dot(piece, weight, g_code, PRODUCT)
        piece = _dot(tl.trans(piece), e, tl.zeros((BN, CODE), tl.float32), PRODUCT)
        tl.store(first_sums + (program * W + columns[:, None]) * CODE + c[None, :], piece)
    g_code *= _code(a0, a1, True, OCTAVES, CODE)
    of_first = _is_of_first_coordinate(OCTAVES, CODE)[None, :]
    at0 = grad + points * 3 + KEPT0
    at1 = grad + points * 3 + KEPT1
    tl.store(at0, tl.load(at0, inside, other=0.0) + tl.sum(tl.where(of_first, g_code, 0.0), 1), inside)
    tl.store(at1, tl.load(at1, inside, other=0.0) + tl.sum(tl.where(of_first, 0.0, g_code), 1), inside)
    tl.store(grad + points * 3 + COORDINATE, g_before, inside)
    tl.store(y + points * 3 + COORDINATE, before, inside)


@triton.jit
def weight_gradient_kernel(g, h, out, N, stride, D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
                           PRODUCT: tl.constexpr):
    """Partial sums of the weight gradients sum_p g_j(p) h_j(p)^T over the N points, for all j: out `(shares, D, W, W)`,
    one partial sum per share of the points. The order of summation is fixed, so runs with the same seed are identical.
    Grid: (tiles of a matrix, matrices, shares)."""
    i = tl.program_id(0) // (W // BW) * BW + tl.arange(0, BW)
    k = tl.program_id(0) % (W // BW) * BW + tl.arange(0, BW)
    j = tl.program_id(1)
    share = tl.program_id(2)
    shares = tl.num_programs(2)
    total = tl.zeros((BW, BW), tl.float32)
    for start in range(share * BK, N, shares * BK):
        points = start + tl.arange(0, BK)
        mask = points < N
        gradient = tl.load(g + j * stride + points[None, :] * W + i[:, None], mask[None, :], other=0.0)  # (BW, BK)
        value = tl.load(h + j * stride + points[:, None] * W + k[None, :], mask[:, None], other=0.0)  # (BK, BW)
        total = _dot(gradient, value, total, PRODUCT)
    tl.store(out + ((share * D + j) * W + i[:, None]) * W + k[None, :], total)

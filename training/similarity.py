"""Robust fit of a similarity between point sets, and its application.

Notation
    p, q  corresponding positions, pixels                                          (n, 2)
    S     similarity p -> q: rotation, zoom and shift as an affine map              (2, 3)
"""

import numpy as np

MIN_POINTS = 6        # minimum number of points for a similarity
ITERATIONS = 10       # of iteratively reweighted least squares


def similarity(p: np.ndarray, q: np.ndarray, scale: float,
               weights: np.ndarray | float = 1.0) -> np.ndarray | None:
    """Robust fit of the similarity `(2, 3)` that maps positions p to q, both `(n, 2)`; None for fewer than MIN_POINTS.

    Iteratively reweighted least squares with Geman-McClure weights, from the fit of the smallest mean distance.
    `scale`: distance in pixels at which the weight of a point is 1/4. `weights` `(n,)`: factors."""
    if len(p) < MIN_POINTS:
        return None
    z = p[:, 0] + 1j * p[:, 1]  # a similarity is z -> a z + b for complex numbers
    target = q[:, 0] + 1j * q[:, 1]
    r = np.ones(len(p))
    for k in range(ITERATIONS):
        if k < ITERATIONS / 2:
            w = weights / np.maximum(r, 0.01)
        else:
            w = weights * (1 + (r / scale) ** 2) ** -2
        w = w / max(w.sum(), 1e-30)
        center = w @ z
        offset = z - center
        a = (w * offset.conj()) @ target / max(w @ np.abs(offset) ** 2, 1e-9)
        b = w @ target - a * center
        r = np.abs(a * z + b - target)
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def apply(S: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Positions `(..., 2)` after the affine map `(2, 3)` or `(3, 3)`."""
    return (p @ S[:2, :2].T + S[:2, 2]).astype(np.float32)

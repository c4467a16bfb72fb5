"""Motion segmentation from tracks: which tracks do not move with the background.

Under an affine camera all tracks of a rigid scene lie in one affine subspace of dimension 3 (Tomasi and Kanade, IJCV
1992): four tracks span it. As in Sheikh, Javed and Kanade ("Background subtraction for freely moving cameras", ICCV
2009, section 3), the background is the subspace with the most tracks near it, found by RANSAC; the rest is foreground.
The model predicts positions behind occluders too, so that tracks are complete, as the factorization needs.

Notation
    N, T     tracks, frames
    x        tracks as vectors (x_1, y_1, ..., x_T, y_T)   (N, 2 T)
    residual distance of a track from the subspace, root mean square over frames, in pixels   (N,)
"""

import numpy as np

SAMPLES = 400   # RANSAC samples
BASIS = 4       # tracks in a sample: they span an affine subspace of dimension 3
NEIGHBORS = 13  # nearest tracks that vote on the label of a track
FLOOR = 0.004   # smallest residual of foreground, as a share of the frame's longer side


def foreground_tracks(tracks: np.ndarray, visible: np.ndarray, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Foreground `(N,)` bool of tracks `(N, T, 2)`, visible `(N, T)`, in frames of `size` (H, W).

    All False if there are fewer than 8 tracks or all move with the background."""
    N = len(tracks)
    x = tracks.reshape(N, -1).astype(np.float64)
    if N < 2 * BASIS or not np.isfinite(x).all():
        return np.zeros(N, bool)
    floor = FLOOR * max(size)
    rng = np.random.default_rng(seed)
    near = np.zeros(N, bool)
    for _ in range(SAMPLES):
        found = _residuals(x, rng.choice(N, BASIS, replace=False), visible) < floor
        if found.sum() > near.sum():
            near = found
    for _ in range(3):  # refit the subspace to its inliers, then select inliers again
        if near.sum() < BASIS:
            return np.zeros(N, bool)
        residual = _residuals(x, np.flatnonzero(near), visible)
        near = residual < max(floor, _otsu_threshold(residual))
    return _without_specks(~near, tracks[:, visible.sum(0).argmax()])


def _residuals(x: np.ndarray, members: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Residuals of all x, over the frames where they are visible, from the affine 3-d subspace that fits the tracks
    `members` `(M,)` best."""
    center = x[members].mean(0)
    _, _, basis = np.linalg.svd(x[members] - center, full_matrices=False)
    inside = (x - center) @ basis[: BASIS - 1].T @ basis[: BASIS - 1]
    square = ((x - center - inside) ** 2).reshape(*visible.shape, 2).sum(-1)  # (N, T)
    return np.sqrt((square * visible).sum(1) / visible.sum(1).clip(1))


def _otsu_threshold(residual: np.ndarray) -> float:
    """Otsu's threshold of the logarithms: the split of largest variance between its sides."""
    values = np.sort(np.log(residual + 1e-6))
    n = np.arange(1, len(values))
    sums = np.cumsum(values)
    low, high = sums[:-1] / n, (sums[-1] - sums[:-1]) / (len(values) - n)
    k = int(np.argmax(n * (len(values) - n) * (high - low) ** 2))
    return float(np.exp((values[k] + values[k + 1]) / 2))


def _without_specks(foreground: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Each track gets the label of most of the `NEIGHBORS` tracks nearest to its point `(N, 2)`, twice."""
    count = min(NEIGHBORS, len(points) - 1)
    nearest = np.stack([np.argpartition(((points - point) ** 2).sum(-1), count)[:count] for point in points])
    for _ in range(2):
        foreground = foreground[nearest].mean(1) > 0.5
    return foreground

"""Find the scenes of a video: cuts, blank frames and duplicated frames.

Notation
    thumbnail  (h, w) gray: a frame with a shorter side of at most SIDE pixels, without bars at its borders
    a, b       two thumbnails
    share      part of the textured pixels of a that have a counterpart in b: optical flow leads there and back within
               MAX_CYCLE_ERROR, inside the frame, and the patches at both ends are alike

Two frames are connected if the share is at least MIN_SHARE, from a to b or from b to a. Scenes are the connected
components. Each frame is compared with the next one that is not blank; if the two are not connected, frames that are
up to REACH apart are compared, too, so that a flash or something that covers the whole frame for a moment is no cut.
A fast pan is followed by a shift that phase correlation finds.

The share is 0.7 or more for adjacent frames of the clips that it was measured on, and at most 0.05 across a cut
(docs/preprocessing.md).
"""

import logging
from collections.abc import Callable, Iterable

import cv2
import numpy as np

from loaders.scenes import BLANK, Scenes, frames_text, one_scene
from loaders.sequence import VideoSequence
from third_party.dis import DisFlow

log = logging.getLogger(__name__)
SIDE = 96            # pixels of a thumbnail's shorter side
MIN_SHARE = 0.17     # smallest share of connected frames
QUICK_SHARE = 0.4    # frames with this share of patches that are alike at the same place are connected
MAX_CYCLE_ERROR = 1.0  # pixels of a thumbnail: largest forward-backward error of a counterpart
ALIKE = 0.8          # smallest correlation of patches that are alike
PATCH = 9            # pixels of a thumbnail: side of a patch
MIN_TEXTURE = 16.0   # squared gray levels: smallest variance of a textured patch, if the frame has enough contrast
TEXTURE_SHARE = 0.02  # the same as a share of the variance of the whole frame
FEW_TEXTURED = 0.02  # a frame with a smaller share of textured patches has no counterparts to look for
SIMILAR_GRAY = 16.0  # gray levels: mean difference below which two frames without texture are connected
REACH = 3            # largest distance of frames that are compared around a possible cut, not counting blank ones
REACH_BLANK = 10     # the same around blank frames, which may be something that passes close to the camera
SHIFTS = 3           # number of peaks of the phase correlation that are tried
BLANK_SIDE = 32      # pixels of the shorter side of the picture in which a blank frame is of one color
BLANK_RANGE = 8.0    # levels of each color between the darkest and brightest 0.5% of a blank frame, at most
DUPLICATE_MEAN = 0.3   # levels: largest mean difference of a duplicated frame
DUPLICATE_RANGE = 2.0  # levels: largest difference of a duplicated frame, averaged over 3x3 pixels
DUPLICATE_SHARE = 0.1  # the same as a share of the standard deviation of the frame
BAR_RANGE = 6.0      # gray levels: range within a row or column that belongs to a bar


def find_scenes(frames: Iterable[np.ndarray]) -> Scenes:
    """The scenes of frames `(H, W, 3)` uint8 RGB of one size; each is read once.

    If no two of more than two frames are connected, as in noise, all are one scene."""
    thumbnails, blank, duplicates = [], [], []
    before = None
    for t, frame in enumerate(frames):
        blank.append(_is_blank(frame))
        if before is not None and not blank[-1] and _is_duplicate(before, frame):
            duplicates.append(t)
        thumbnails.append(_thumbnail(frame))
        before = frame
    shown = np.flatnonzero(~np.array(blank, bool)).tolist()
    thumbnails = _without_bars(thumbnails, shown)
    scene = np.full(len(blank), BLANK, np.int64)
    scene[shown] = _components(shown, lambda a, b: connected(thumbnails[a], thumbnails[b]))
    if len(shown) > 2 and scene.max() == len(shown) - 1:  # each frame is a scene
        log.warning("no two frames are alike enough to find scenes: all frames are taken as one scene")
        scene[shown] = 0
    return Scenes(scene, tuple(duplicates))


def scenes_of(sequence: VideoSequence, find: bool = True) -> Scenes:
    """The scenes of a sequence, which are also logged. Without `find`, all frames are one scene."""
    if not find:
        return one_scene(len(sequence))
    scenes = find_scenes(sequence.frame(t) for t in range(len(sequence)))
    report(scenes)
    return scenes


def report(scenes: Scenes) -> None:
    """Log the cuts, blank and duplicated frames in one line, if there are any."""
    found = []
    if scenes.count > 1:
        found.append(f"{scenes.count} scenes ({scenes.names()}; --scene N takes one), cuts before "
                     f"{frames_text(scenes.cuts)}")
    if scenes.blank:
        found.append(f"blank {frames_text(scenes.blank)}")
    if scenes.duplicates:
        found.append(f"duplicates of the frame before: {frames_text(scenes.duplicates)}")
    if found:
        log.warning("%s", "; ".join(found))


def connected(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two thumbnails `(h, w)` show the same scene."""
    textured = [_textured(a), _textured(b)]
    if max(mask.mean() for mask in textured) < FEW_TEXTURED:
        return bool(np.abs(a - b).mean() < SIMILAR_GRAY)
    if _share(_alike(a, b), textured) >= QUICK_SHARE:
        return True
    return any(_share_of_counterparts(a, b, textured, shift) >= MIN_SHARE for shift in [(0, 0), *_shifts(a, b)])


def _components(shown: list[int], linked: Callable[[int, int], bool]) -> np.ndarray:
    """Number of the component of each of the n frames `shown`, `(n,)`, from 0 in order of appearance.

    `linked` compares two frames. Neighbors are compared first, then frames on both sides of those that are not linked.
    """
    count = len(shown)
    parent = np.arange(count)

    def root(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    gaps = []
    for k in range(count - 1):
        if linked(shown[k], shown[k + 1]):
            parent[root(k + 1)] = root(k)
        else:
            gaps.append(k)
    for gap in gaps:
        reach = REACH if shown[gap + 1] == shown[gap] + 1 else REACH_BLANK
        for distance in range(2, reach + 1):
            for k in range(max(gap - distance + 1, 0), min(gap, count - 1 - distance) + 1):
                low, high = sorted((root(k), root(k + distance)))
                if low != high and linked(shown[k], shown[k + distance]):
                    parent[high] = low
    roots = [root(k) for k in range(count)]
    order = {r: number for number, r in enumerate(dict.fromkeys(roots))}
    return np.array([order[r] for r in roots], np.int64)


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """A thumbnail `(h, w)` float32 of a frame, bars included."""
    H, W = frame.shape[:2]
    zoom = min(1.0, SIDE / min(H, W))
    size = max(round(W * zoom), 16), max(round(H * zoom), 16)  # DIS needs 16 pixels
    return cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA).astype(np.float32)


def _without_bars(thumbnails: list[np.ndarray], shown: list[int]) -> list[np.ndarray]:
    """Cut off the rows and columns at the borders that are of one gray level in all `shown` frames (letterbox)."""
    if not shown:
        return thumbnails
    sides = []
    for axis in (1, 0):  # rows, columns
        ranges = np.max([np.ptp(thumbnails[t], axis=axis) for t in shown], axis=0)
        inside = np.flatnonzero(ranges > BAR_RANGE)
        first, last = (inside[0], inside[-1] + 1) if len(inside) else (0, len(ranges))
        margin = 1 if first or last < len(ranges) else 0  # the edge of a bar may be blurred
        first, last = (first + margin * (first > 0), last - margin * (last < len(ranges)))
        sides.append(slice(first, last) if last - first >= 16 else slice(None))
    return [np.ascontiguousarray(thumbnail[sides[0], sides[1]]) for thumbnail in thumbnails]


def _is_blank(frame: np.ndarray) -> bool:
    """Whether a frame `(H, W, 3)` has one color, up to noise."""
    H, W = frame.shape[:2]
    zoom = min(1.0, BLANK_SIDE / min(H, W))
    small = cv2.resize(frame, (max(round(W * zoom), 1), max(round(H * zoom), 1)), interpolation=cv2.INTER_AREA)
    small = cv2.blur(small, (3, 3))
    low, high = np.percentile(small.reshape(-1, 3), (0.5, 99.5), axis=0)
    return bool((high - low).max() <= BLANK_RANGE)


def _is_duplicate(before: np.ndarray, frame: np.ndarray) -> bool:
    """Whether two frames `(H, W, 3)` are equal up to compression."""
    difference = np.abs(before.astype(np.int16) - frame).astype(np.float32).mean(axis=-1)
    largest = min(DUPLICATE_RANGE, DUPLICATE_SHARE * float(frame.std()))
    return bool(difference.mean() <= DUPLICATE_MEAN and cv2.blur(difference, (3, 3)).max() <= largest)


def _patch_statistics(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance `(h, w)` of the patch around each pixel of a thumbnail."""
    mean = cv2.blur(a, (PATCH, PATCH))
    return mean, cv2.blur(a * a, (PATCH, PATCH)) - mean * mean


def _textured(a: np.ndarray) -> np.ndarray:
    """Pixels `(h, w)` bool of a thumbnail whose patches have texture."""
    return _patch_statistics(a)[1] > max(1.0, min(MIN_TEXTURE, TEXTURE_SHARE * float(a.var())))


def _alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pixels `(h, w)` bool at which the patches of two thumbnails are correlated."""
    mean_a, variance_a = _patch_statistics(a)
    mean_b, variance_b = _patch_statistics(b)
    covariance = cv2.blur(a * b, (PATCH, PATCH)) - mean_a * mean_b
    return covariance > ALIKE * np.sqrt(np.maximum(variance_a, 1) * np.maximum(variance_b, 1))


def _share(counterpart: np.ndarray, textured: list[np.ndarray]) -> float:
    """Largest share of textured pixels that have a counterpart, of those masks that have enough texture."""
    return max((counterpart & mask).sum() / mask.sum() for mask in textured if mask.mean() >= FEW_TEXTURED)


def _share_of_counterparts(a: np.ndarray, b: np.ndarray, textured: list[np.ndarray], shift: tuple[int, int]) -> float:
    """The share from a to b or from b to a, whichever is larger. shift: (x, y), where flow starts."""
    there, back = _flow(a, b, shift), _flow(b, a, (-shift[0], -shift[1]))
    return max(_counterparts(a, b, there, back, textured[0]), _counterparts(b, a, back, there, textured[1]))


def _counterparts(a: np.ndarray, b: np.ndarray, there: np.ndarray, back: np.ndarray, textured: np.ndarray) -> float:
    """The share of a in b, given the flows `(h, w, 2)`."""
    if textured.mean() < FEW_TEXTURED:
        return 0.0
    h, w = a.shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    x, y = x + there[..., 0], y + there[..., 1]
    inside = (x >= 0) & (y >= 0) & (x <= w - 1) & (y <= h - 1)
    error = there + cv2.remap(back, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    consistent = (error ** 2).sum(axis=-1) <= MAX_CYCLE_ERROR ** 2
    warped = cv2.remap(b, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return float((consistent & inside & textured & _alike(a, warped)).sum() / textured.sum())


def _flow(a: np.ndarray, b: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
    """Flow `(h, w, 2)` from a to b that starts at a shift (x, y) in pixels."""
    x, y = shift
    moved = cv2.warpAffine(b, np.float32([[1, 0, -x], [0, 1, -y]]), (a.shape[1], a.shape[0]),
                           borderMode=cv2.BORDER_REPLICATE)
    return DisFlow()(a.astype(np.uint8), moved.astype(np.uint8)) + np.float32(shift)


def _shifts(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """The shifts (x, y) at the highest peaks of the phase correlation of two thumbnails, on a plane of twice their
    size, so that shifts of more than half of the frame are found."""
    h, w = a.shape
    spectrum = np.conj(np.fft.rfft2(a - a.mean(), (2 * h, 2 * w))) * np.fft.rfft2(b - b.mean(), (2 * h, 2 * w))
    size = np.abs(spectrum)
    phases = spectrum / (size + 1e-6 * size.max() + 1e-12)
    surface = cv2.GaussianBlur(np.fft.irfft2(phases, (2 * h, 2 * w)), (0, 0), 1.0)
    out = []
    for _ in range(SHIFTS):
        y, x = divmod(int(surface.argmax()), 2 * w)
        out.append(((x + w) % (2 * w) - w, (y + h) % (2 * h) - h))
        rows, columns = ([(peak + k) % side for k in range(-3, 4)] for peak, side in ((y, 2 * h), (x, 2 * w)))
        surface[np.ix_(rows, columns)] = -np.inf
    return out

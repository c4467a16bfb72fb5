"""Points and matches drawn over frames.

Notation
    T, H, W, N  frames, height, width, points
    picture     a frame enlarged by `zoom`, so that marks on a small video can be told apart
"""

from collections.abc import Iterator

import cv2
import numpy as np

PICTURE_SIDE = 480  # pictures' shorter side, at least
SHIFT = 4           # binary places of cv2's sub-pixel coordinates
DARK = (20, 20, 20)


def picture_zoom(size: tuple[int, int]) -> int:
    """Whole factor by which frames of `size` (H, W) are enlarged."""
    return max(1, -(-PICTURE_SIDE // min(size)))


def enlarge(frame: np.ndarray, zoom: int) -> np.ndarray:
    """A frame `(H, W, 3)` uint8 as `(zoom H, zoom W, 3)`."""
    if zoom == 1:
        return frame.copy()
    return cv2.resize(frame, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)


def draw_points(picture: np.ndarray, points: np.ndarray, visible: np.ndarray, colours: np.ndarray, zoom: int) -> None:
    """Mark points `(N, 2)`, in pixels of the frame, on its picture: a disc where visible `(N,)`, a ring where occluded.

    Points outside the frame are not drawn. Discs lie over rings."""
    H, W = picture.shape[0] / zoom, picture.shape[1] / zoom
    inside = ((points >= -0.5) & (points <= np.array([W, H]) - 0.5)).all(axis=-1)
    radius = max(4.0, min(picture.shape[:2]) / 130)
    centres = (points + 0.5) * zoom - 0.5
    for n in sorted(np.flatnonzero(inside), key=lambda n: bool(visible[n])):
        colour = tuple(int(c) for c in colours[n])
        if visible[n]:
            _circle(picture, centres[n], radius + 1, DARK, cv2.FILLED)
            _circle(picture, centres[n], radius, colour, cv2.FILLED)
        else:
            _circle(picture, centres[n], radius + 1, DARK, 3)
            _circle(picture, centres[n], radius + 1, colour, 1)


def track_pictures(frames: np.ndarray, tracks: np.ndarray, visible: np.ndarray, colours: np.ndarray,
                   query_frame: int) -> Iterator[np.ndarray]:
    """Pictures of all frames `(T, H, W, 3)` with tracks `(N, T, 2)`, visible `(N, T)`, in colours `(N, 3)`."""
    zoom = picture_zoom(frames.shape[1:3])
    for t, frame in enumerate(frames):
        picture = enlarge(frame, zoom)
        draw_points(picture, tracks[:, t], visible[:, t], colours, zoom)
        write_caption(picture, f"{t}  query" if t == query_frame else f"{t}")
        yield picture


def match_picture(frame_a: np.ndarray, frame_b: np.ndarray, points: np.ndarray, matches: np.ndarray,
                  colours: np.ndarray) -> np.ndarray:
    """Points `(N, 2)` of frame a and where they are in frame b `(N, 2)`, side by side."""
    zoom = picture_zoom(frame_a.shape[:2])
    pictures = [enlarge(frame, zoom) for frame in (frame_a, frame_b)]
    for picture, places in zip(pictures, (points, matches), strict=True):
        draw_points(picture, places, np.ones(len(places), bool), colours, zoom)
    return np.concatenate(pictures, axis=1)


def write_caption(picture: np.ndarray, text: str) -> None:
    """Small text in the upper left corner."""
    for colour, width in ((DARK, 3), ((255, 255, 255), 1)):
        cv2.putText(picture, text, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, colour, width, cv2.LINE_AA)


def point_grid(size: tuple[int, int], interval: int = 0) -> np.ndarray:
    """Points `(N, 2)` of a regular grid on a frame of `size` (H, W); `interval` 0 puts about 20 along its longer
    side."""
    interval = interval or max(1, round(max(size) / 20))
    y, x = np.mgrid[interval // 2: size[0]: interval, interval // 2: size[1]: interval]
    return np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)


def _circle(picture: np.ndarray, centre: np.ndarray, radius: float, colour: tuple, thickness: int) -> None:
    scale = 1 << SHIFT
    place = tuple(round(float(c) * scale) for c in centre)
    cv2.circle(picture, place, round(radius * scale), colour, thickness, cv2.LINE_AA, SHIFT)

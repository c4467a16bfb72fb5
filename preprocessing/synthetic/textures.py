"""Textures that can be tracked: like natural images they have detail at all scales; no flat areas and no repetition.

Notation
    slope    the amplitude of noise is proportional to frequency^-slope; photographs have a slope of about 1
    palette  (k, 3) RGB colors, 0..255
    texture  (h, w, 3) float32 RGB, 0..255; a volume is (n, n, n, 3)

The ground uses the dead leaves model (Lee, Mumford and Huang, IJCV 2001): shapes of all sizes that occlude each other.
"""

import cv2
import numpy as np

PALETTES = {
    "forest": [(74, 92, 42), (120, 138, 62), (52, 66, 38), (150, 128, 74), (96, 70, 44), (176, 168, 112), (38, 46, 34)],
    "autumn": [(186, 84, 32), (222, 148, 48), (132, 44, 28), (92, 52, 34), (240, 196, 98), (160, 108, 56)],
    "bark": [(92, 72, 56), (58, 44, 36), (126, 104, 82), (150, 132, 110), (74, 62, 44)],
    "coral": [(214, 96, 110), (244, 156, 142), (140, 42, 84), (250, 214, 190), (110, 60, 120), (232, 120, 70)],
    "lagoon": [(30, 92, 128), (66, 150, 170), (20, 52, 92), (156, 206, 196), (44, 118, 96), (224, 226, 186)],
    "granite": [(136, 130, 140), (86, 82, 96), (190, 182, 176), (58, 60, 76), (214, 196, 168), (150, 108, 98)],
}


def noise(shape: tuple[int, ...], rng: np.random.Generator, slope: float,
          stretch: tuple[float, ...] = ()) -> np.ndarray:
    """Gaussian noise of the given shape with mean 0 and standard deviation 1.

    stretch: factor for each axis by which features are longer along it."""
    padded = [n + n // 4 + 8 for n in shape]  # noise from an FFT is periodic; only part of a period is used
    axes = [np.fft.fftfreq(n) for n in padded[:-1]] + [np.fft.rfftfreq(padded[-1])]
    stretch = stretch or (1.0,) * len(shape)
    squares = np.ix_(*[(s * f) ** 2 for s, f in zip(stretch, axes, strict=True)])
    frequency = np.sqrt(sum(squares))
    low_pass = np.exp(-(frequency / 0.35) ** 4)  # removes frequencies near Nyquist's
    gain = low_pass / np.maximum(frequency, 1 / max(padded)) ** slope
    out = np.fft.irfftn(np.fft.rfftn(rng.standard_normal(padded)) * gain, padded, axes=range(len(shape)))
    out = out[tuple(slice(n) for n in shape)]
    return ((out - out.mean()) / out.std()).astype(np.float32)


def dead_leaves(shape: tuple[int, int], rng: np.random.Generator, palette: str, largest: float) -> np.ndarray:
    """A texture `(h, w, 3)` of overlapping leaves with radii from 2.5 to `largest` texels, small ones on top."""
    h, w = shape
    colors = np.array(PALETTES[palette], np.float32)
    out = np.empty((h, w, 3), np.float32)
    out[:] = colors[0]
    low, high = 2.5, max(largest, 4.0)
    count = int(1.6 * h * w / (np.pi * low * high)) + 40
    u = rng.random(count)
    radii = 1 / np.sqrt(low ** -2 + u * (high ** -2 - low ** -2))  # density r^-3, which is scale-invariant
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    for radius in np.sort(radii)[::-1]:
        color = colors[rng.integers(len(colors))] * rng.uniform(0.75, 1.25) + rng.normal(0, 8, 3)
        outline = 1 + 0.25 * rng.normal() * np.cos(2 * angles) + 0.1 * rng.normal() * np.cos(3 * angles + 1)
        leaf = radius * outline * np.stack([np.cos(angles), rng.uniform(0.4, 1) * np.sin(angles)])  # (2, 20)
        turn = rng.uniform(0, 2 * np.pi)
        c, s = np.cos(turn), np.sin(turn)
        points = (np.array([[c, -s], [s, c]]) @ leaf).T + rng.random(2) * (w, h)
        cv2.fillPoly(out, [np.rint(points * 16).astype(np.int32)], color.tolist(), cv2.LINE_AA, 4)
    return weather(out, rng)


def fibers(shape: tuple[int, int], rng: np.random.Generator, palette: str) -> np.ndarray:
    """A texture `(h, w, 3)` of long ridges and cracks, like bark or cloth."""
    band = noise(shape, rng, 1.0, (2.2, 1.0))
    crack = np.abs(noise(shape, rng, 0.9, (2.8, 1.0)))
    return weather(_colors(band, crack, palette), rng)


def solid(side: int, rng: np.random.Generator, palette: str) -> np.ndarray:
    """A volume `(side, side, side, 3)` that looks like veined stone."""
    shape = (side, side, side)
    out = _colors(noise(shape, rng, 1.9), np.abs(noise(shape, rng, 1.9)), palette)
    out *= np.exp(0.28 * noise(shape, rng, 1.1))[..., None]
    return out.clip(8, 247)


def weather(texture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The texture `(h, w, 3)` with random brightness and tint at all scales, slightly blurred against aliasing."""
    shape = texture.shape[:2]
    light = np.exp(0.3 * noise(shape, rng, 1.2))[..., None]
    tint = np.stack([noise(shape, rng, 1.2) for _ in range(3)], -1)
    return cv2.GaussianBlur(texture * light + 6 * tint, (0, 0), 0.7).clip(8, 247)


def _colors(band: np.ndarray, crack: np.ndarray, palette: str) -> np.ndarray:
    """RGB `(..., 3)`: the palette's colors by the value of `band`, with dark lines where `crack` is near 0."""
    colors = np.array(PALETTES[palette], np.float32)
    k = len(colors)
    edges = np.quantile(band[..., ::2], np.arange(1, k) / k)
    knots = np.repeat(edges, 2) + np.tile([-0.05, 0.05], k - 1)  # a steep transition between two colors at each edge
    values = np.concatenate([colors[:1], np.repeat(colors[1:-1], 2, axis=0), colors[-1:]])
    out = np.stack([np.interp(band, knots, values[:, c]) for c in range(3)], -1).astype(np.float32)
    return out * (1 - 0.55 * np.exp(-(crack / 0.07) ** 2))[..., None]

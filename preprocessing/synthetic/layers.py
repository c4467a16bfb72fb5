"""The surfaces of a synthetic scene: where each of their points is in each frame, and what is seen at a pixel.

Notation
    T        frames; t is a frame number
    p        point of the frame (..., 2), pixels, x right, y down, centers at integers
    q        point in the plane of a layer (..., 2), pixels at the layer's reference scale
    m        material point: the same number for the same speck of paint in all frames; (..., 2) of a Sheet, (..., 3) of
             an Ellipsoid
    affine   (T, 2, 3): p = A q + b
    edge     signed distance of p to the layer's outline, pixels, positive inside

Both surfaces map in closed form in both directions, so that tracks and pictures agree to rounding.
"""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Outline:
    """A closed curve around 0: an ellipse of half axes `axes` whose radius is scaled by 1 + ripples of the angle."""
    axes: tuple[float, float]
    ripples: tuple[tuple[int, float, float], ...] = ()  # (waves a turn, amplitude, phase)

    def edge(self, m: np.ndarray) -> np.ndarray:
        """Approximate signed distance of `m` `(..., 2)` to the curve, exact in sign."""
        x, y = m[..., 0] / self.axes[0], m[..., 1] / self.axes[1]
        angle = np.arctan2(y, x)
        radius = 1 + sum(a * np.cos(k * angle + phase) for k, a, phase in self.ripples)
        return (radius - np.hypot(x, y)) * min(self.axes)


@dataclass(frozen=True)
class Shear:
    """A traveling wave that moves one coordinate by a function of the other; undone exactly by its negative."""
    axis: int          # the coordinate that moves
    amplitude: float   # pixels
    wavelength: float  # pixels
    phase: np.ndarray  # (T,) radians

    def __call__(self, q: np.ndarray, t: int, sign: int) -> np.ndarray:
        out = q.copy()
        angle = q[..., 1 - self.axis] * (2 * np.pi / self.wavelength) + self.phase[t]
        out[..., self.axis] += sign * self.amplitude * np.sin(angle)
        return out


@dataclass(frozen=True)
class Sheet:
    """A painted plane; with an outline it is cut out, with shears it is not rigid."""
    affine: np.ndarray               # (T, 2, 3)
    texture: np.ndarray              # (h, w, 3) float32
    origin: np.ndarray               # (2,) m of texel (0, 0)
    density: float                   # texels a pixel
    outline: Outline | None = None   # None: without end
    shears: tuple[Shear, ...] = ()

    def look_up(self, p: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Material point `(..., 2)` and edge `(...)` at the points `p` `(..., 2)` of frame t."""
        m = to_plane(self.affine[t], p)
        for shear in reversed(self.shears):
            m = shear(m, t, -1)
        return m, np.full(m.shape[:-1], np.inf) if self.outline is None else self.outline.edge(m)

    def project(self, m: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Position `(..., 2)` of material points in frame t, and whether they face the camera `(...)`."""
        for shear in self.shears:
            m = shear(m, t, 1)
        return to_frame(self.affine[t], m), np.ones(m.shape[:-1], bool)

    def color(self, m: np.ndarray) -> np.ndarray:
        """RGB `(h, w, 3)` at material points `(h, w, 2)`."""
        texel = ((m - self.origin) * self.density).astype(np.float32)
        return cv2.remap(self.texture, texel[..., 0], texel[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)

    def reach(self, t: int) -> tuple[np.ndarray, float]:
        """Center `(2,)` and radius in frame t of a circle that holds the layer."""
        if self.outline is None:
            return np.zeros(2), np.inf
        radius = max(self.outline.axes) * (1 + sum(abs(a) for _, a, _ in self.outline.ripples))
        radius += sum(shear.amplitude for shear in self.shears)
        return self.affine[t, :, 2], radius * np.linalg.norm(self.affine[t, :, 0])


@dataclass(frozen=True)
class Ellipsoid:
    """A solid, cut from a block of stone, that turns in front of an orthographic camera (z away from it)."""
    affine: np.ndarray    # (T, 2, 3)
    rotation: np.ndarray  # (T, 3, 3) from the object to the layer's plane and depth
    axes: np.ndarray      # (3,) half axes, pixels
    volume: np.ndarray    # (n, n, n, 3) float32, its corners at m = +-max(axes)

    def look_up(self, p: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Material point `(..., 3)` of the nearer surface and edge `(...)` at the points `p` `(..., 2)` of frame t.

        In the object's coordinates divided by the axes the surface is a unit sphere and the pixel's ray a line; its
        point nearest to 0 has norm r, and the first hit lies sqrt(1 - r^2) before it."""
        q = to_plane(self.affine[t], p)
        unit = self.rotation[t].T / self.axes[:, None]       # (3, 3)
        ray = unit[:, 2] / np.linalg.norm(unit[:, 2])
        nearest = (np.eye(3) - np.outer(ray, ray)) @ unit[:, :2]  # (3, 2)
        y = q @ nearest.T                                    # (..., 3)
        r = np.linalg.norm(y, axis=-1)
        hit = y - np.sqrt(np.maximum(1 - r ** 2, 0))[..., None] * ray
        slope = np.linalg.norm(y @ nearest, axis=-1) / np.maximum(r, 1e-9)  # |grad r|, a pixel
        return hit * self.axes, (1 - r) / np.maximum(slope, 1e-9)

    def project(self, m: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Position `(..., 2)` of surface points in frame t, and whether they face the camera `(...)`."""
        normal = (m / self.axes ** 2) @ self.rotation[t].T
        return to_frame(self.affine[t], (m @ self.rotation[t].T)[..., :2]), normal[..., 2] < 0

    def color(self, m: np.ndarray) -> np.ndarray:
        """RGB `(..., 3)` at surface points `(..., 3)`, interpolated linearly in the volume."""
        n = len(self.volume)
        voxel = ((m / self.axes.max() + 1) * (n - 1) / 2).clip(0, n - 1.001)
        low = voxel.astype(np.int64)
        part = (voxel - low).astype(np.float32)
        flat, first = self.volume.reshape(-1, 3), (low[..., 0] * n + low[..., 1]) * n + low[..., 2]
        out = np.zeros((*m.shape[:-1], 3), np.float32)
        for corner in np.ndindex(2, 2, 2):
            weight = np.where(corner, part, 1 - part).prod(axis=-1)
            out += weight[..., None] * flat[first + (corner[0] * n + corner[1]) * n + corner[2]]
        return out

    def reach(self, t: int) -> tuple[np.ndarray, float]:
        """Center `(2,)` and radius in frame t of a circle that holds the layer."""
        return self.affine[t, :, 2], self.axes.max() * np.linalg.norm(self.affine[t, :, 0])


def to_frame(affine: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p = A q + b."""
    return q @ affine[:, :2].T + affine[:, 2]


def to_plane(affine: np.ndarray, p: np.ndarray) -> np.ndarray:
    """q with p = A q + b."""
    return (p - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T

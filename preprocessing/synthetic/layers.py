"""The surfaces (layers) of a synthetic scene: their motion, outlines and colors.

Notation
    T        number of frames; t is a frame number
    p        point in a frame (..., 2) in pixels; x right, y down, pixel centers at integers
    q        point in the plane of a layer (..., 2), in pixels at the layer's reference scale
    m        material point: coordinates on the surface that do not change over time; (..., 2) on a Sheet, (..., 3) on
             an Ellipsoid
    affine   (T, 2, 3): the map from the plane to each frame, p = A q + b
    edge     signed distance in pixels of p to the layer's outline, positive inside

Both kinds of surfaces map p to m and m to p in closed form, so ground-truth tracks and images agree up to rounding.
"""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Outline:
    """A closed curve around the origin: an ellipse whose radius is multiplied by 1 + a sum of cosines of the angle."""
    axes: tuple[float, float]                           # half axes of the ellipse, pixels
    ripples: tuple[tuple[int, float, float], ...] = ()  # cosines: (periods per turn, amplitude, phase in radians)

    def edge(self, m: np.ndarray) -> np.ndarray:
        """Signed distance `(...)` of `m` `(..., 2)` to the curve, pixels; only its sign is exact."""
        x = m[..., 0] / self.axes[0]
        y = m[..., 1] / self.axes[1]
        angle = np.arctan2(y, x)
        radius = 1 + sum(a * np.cos(k * angle + phase) for k, a, phase in self.ripples)
        return (radius - np.hypot(x, y)) * min(self.axes)


@dataclass(frozen=True)
class Shear:
    """A traveling wave: moves one coordinate by a sine of the other. sign 1 applies it, sign -1 inverts it exactly."""
    axis: int          # the coordinate that moves: 0 is x, 1 is y
    amplitude: float   # pixels
    wavelength: float  # pixels
    phase: np.ndarray  # (T,) radians, in each frame

    def __call__(self, q: np.ndarray, t: int, sign: int) -> np.ndarray:
        out = q.copy()
        angle = q[..., 1 - self.axis] * (2 * np.pi / self.wavelength) + self.phase[t]
        out[..., self.axis] += sign * self.amplitude * np.sin(angle)
        return out


@dataclass(frozen=True)
class Sheet:
    """A textured plane, unbounded or cut out along an outline; with shears it deforms."""
    affine: np.ndarray               # (T, 2, 3)
    texture: np.ndarray              # (h, w, 3) float32
    origin: np.ndarray               # (2,) m at texel (0, 0)
    density: float                   # texels per pixel
    outline: Outline | None = None   # None: unbounded
    shears: tuple[Shear, ...] = ()

    def look_up(self, p: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Material point `(..., 2)` and edge `(...)` at the points `p` `(..., 2)` of frame t."""
        m = to_plane(self.affine[t], p)
        for shear in reversed(self.shears):
            m = shear(m, t, -1)
        return m, np.full(m.shape[:-1], np.inf) if self.outline is None else self.outline.edge(m)

    def project(self, m: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Position `(..., 2)` of material points in frame t, and whether they face the camera `(...)` (always)."""
        for shear in self.shears:
            m = shear(m, t, 1)
        return to_frame(self.affine[t], m), np.ones(m.shape[:-1], bool)

    def color(self, m: np.ndarray) -> np.ndarray:
        """RGB `(h, w, 3)` at material points `(h, w, 2)`, interpolated bicubically."""
        texel = ((m - self.origin) * self.density).astype(np.float32)
        return cv2.remap(self.texture, texel[..., 0], texel[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)

    def bounding_circle(self, t: int) -> tuple[np.ndarray, float]:
        """Center `(2,)` and radius in pixels of a circle in frame t that contains the layer."""
        if self.outline is None:
            return np.zeros(2), np.inf
        radius = max(self.outline.axes) * (1 + sum(abs(a) for _, a, _ in self.outline.ripples))
        radius += sum(shear.amplitude for shear in self.shears)
        return self.affine[t, :, 2], radius * np.linalg.norm(self.affine[t, :, 0])


@dataclass(frozen=True)
class Ellipsoid:
    """A rotating ellipsoid with a volumetric texture, seen by an orthographic camera that looks along +z."""
    affine: np.ndarray    # (T, 2, 3)
    rotation: np.ndarray  # (T, 3, 3) from object coordinates m to (q, depth)
    axes: np.ndarray      # (3,) half axes, pixels
    volume: np.ndarray    # (n, n, n, 3) float32 RGB; its corners are at m = +-max(axes)

    def look_up(self, p: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Material point `(..., 3)` of the visible surface and edge `(...)` at the points `p` `(..., 2)` of frame t.

        In object coordinates divided by the axes, the surface is the unit sphere and the viewing ray is a line. If r is
        the distance of the line's nearest point to the origin, the first intersection is sqrt(1 - r^2) before it."""
        q = to_plane(self.affine[t], p)
        unit = self.rotation[t].T / self.axes[:, None]       # (3, 3)
        ray = unit[:, 2] / np.linalg.norm(unit[:, 2])
        nearest = (np.eye(3) - np.outer(ray, ray)) @ unit[:, :2]  # (3, 2)
        y = q @ nearest.T                                    # (..., 3)
        r = np.linalg.norm(y, axis=-1)
        hit = y - np.sqrt(np.maximum(1 - r ** 2, 0))[..., None] * ray
        slope = np.linalg.norm(y @ nearest, axis=-1) / np.maximum(r, 1e-9)  # |grad r| per pixel
        return hit * self.axes, (1 - r) / np.maximum(slope, 1e-9)

    def project(self, m: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Position `(..., 2)` of surface points in frame t, and whether they face the camera `(...)`."""
        normal = (m / self.axes ** 2) @ self.rotation[t].T
        return to_frame(self.affine[t], (m @ self.rotation[t].T)[..., :2]), normal[..., 2] < 0

    def color(self, m: np.ndarray) -> np.ndarray:
        """RGB `(..., 3)` at surface points `(..., 3)`, interpolated trilinearly in the volume."""
        n = len(self.volume)
        voxel = ((m / self.axes.max() + 1) * (n - 1) / 2).clip(0, n - 1.001)
        low = voxel.astype(np.int64)
        fraction = (voxel - low).astype(np.float32)
        flat = self.volume.reshape(-1, 3)
        first = (low[..., 0] * n + low[..., 1]) * n + low[..., 2]  # flat index of the lowest corner
        out = np.zeros((*m.shape[:-1], 3), np.float32)
        for corner in np.ndindex(2, 2, 2):
            weight = np.where(corner, fraction, 1 - fraction).prod(axis=-1)
            out += weight[..., None] * flat[first + (corner[0] * n + corner[1]) * n + corner[2]]
        return out

    def bounding_circle(self, t: int) -> tuple[np.ndarray, float]:
        """Center `(2,)` and radius in pixels of a circle in frame t that contains the layer."""
        return self.affine[t, :, 2], self.axes.max() * np.linalg.norm(self.affine[t, :, 0])


def to_frame(affine: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p = A q + b."""
    return q @ affine[:, :2].T + affine[:, 2]


def to_plane(affine: np.ndarray, p: np.ndarray) -> np.ndarray:
    """q with p = A q + b."""
    return (p - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T

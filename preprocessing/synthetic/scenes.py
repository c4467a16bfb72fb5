"""Layout and motion of the synthetic scenes: ground, rotating solid, waving sheet, and objects that are occluded.

Notation
    T        number of frames
    s        shorter side of the frame in pixels; lengths below are multiples of s unless stated otherwise
    time     t / (T - 1), from 0 to 1: the motion of a clip does not depend on its number of frames
    path     (T, 2) center of a layer relative to the center of the frame, before the camera's motion
    depth    of a layer, 1 for the ground; when the camera pans, a layer moves by 1 / depth times the ground's motion

An encounter is an object (radius r) and a nearer occluder, called trunk (half width w), that passes in front of it. The
distance of their centers is S way(time), where way is -1 at the start and 1 at the end. The object is completely hidden
while |S way| < w - r. With S = 1.1 (r + w) it is completely visible at both ends of the clip. A crossing trunk has
S = 1.1 (0.5 + w): it enters a square frame on one side and leaves it on the other within the first 70% of the clip.

A camera that travels pans, zooms in and turns at constant speed, as seen in the frame, through the whole clip, so that
distant frames show different parts of the ground. One object goes with it and stays in the frame.
"""

from dataclasses import dataclass

import numpy as np

from preprocessing.synthetic.layers import Ellipsoid, Outline, Shear, Sheet, to_plane
from preprocessing.synthetic.textures import PALETTES, dead_leaves, fibers, solid

CROSSING = 0.35  # time at which a crossing trunk is in front of its object
DENSITY = 1.4    # texels per pixel, so that a texel is never larger than a pixel when the camera zooms in


@dataclass(frozen=True)
class Recipe:
    """Amount of motion of a scene over the whole clip, and its encounters."""
    pan: float     # amplitude of the camera's motion
    zoom: float    # amplitude of the magnification, as a share
    roll: float    # amplitude of the camera's rotation, radians
    travel: float  # length of the objects' paths
    wave: float    # amplitude of the waves in the sheet
    spin: float    # rotation of the solid, radians
    encounters: tuple[tuple[str, float], ...] = ()  # (kind: see PLACES, share of the clip in which it is hidden)
    travels: bool = False  # the camera travels: pan in frame widths, zoom as a factor, roll in radians over the clip


RECIPES = {
    "demo": Recipe(0.025, 0.04, 0.03, 0.02, 0.006, 0.4, (("crosses", 0.045),)),
    "easy": Recipe(0.04, 0.08, 0.04, 0.06, 0.010, 0.6),
    "occlusion": Recipe(0.04, 0.06, 0.05, 0.15, 0.016, 1.2, (("passes", 0.34), ("swings", 0.34))),
    "fast": Recipe(0.12, 0.16, 0.18, 0.30, 0.040, 3.0, (("passes", 0.25),)),
    "travel": Recipe(4.0, 4.0, np.pi, 0.12, 0.0, 0.0, travels=True),
}


# Kinds of a scene's encounters -> (r, vertical position of the object, length of the trunk / its width) of each.
# Kinds: the trunk "passes" at constant speed, "swings" in front of the object and back, or "crosses" the whole frame.
PLACES = {("crosses",): ((0.04, -0.04, 12.0),), ("passes",): ((0.09, -0.04, 4.5),),
          ("passes", "swings"): ((0.07, -0.22, 1.8), (0.07, 0.22, 1.8))}


def build_layers(scene: str, size: tuple[int, int], num_frames: int, seed: int) -> list[Sheet | Ellipsoid]:
    """The layers of a scene, farthest first. scene: a key of RECIPES; size: (H, W)."""
    recipe = RECIPES[scene]
    rng = np.random.default_rng(seed)
    stage = _Stage(recipe, size, num_frames, rng)
    names = list(rng.permutation([name for name in PALETTES if name not in ("forest", "bark")]))
    if recipe.travels:
        return [stage.ground("forest"), stage.companion(names[0])]
    layers = [stage.ground("forest"), stage.solid(names[0]), stage.waving_sheet(names[1])]
    for i, (kind, share) in enumerate(recipe.encounters):
        layers += stage.encounter(kind, share, i, names[2 + i])
    return layers


class _Stage:
    """Builds the layers of a scene; holds the camera's motion and the random generator."""

    def __init__(self, recipe: Recipe, size: tuple[int, int], num_frames: int, rng: np.random.Generator):
        self.recipe = recipe
        self.size = size
        self.rng = rng
        self.s = min(size)
        self.time = np.arange(num_frames) / (num_frames - 1)  # (T,)
        self.flip = rng.choice([-1.0, 1.0], 2)                # mirrors the layout
        phase = rng.uniform(-0.3, 0.3, 4)
        if recipe.travels:
            self.zoom = recipe.zoom ** (self.time - 0.5)
            self.roll = recipe.roll * self.time
            step = recipe.pan * size[1] / self.s * np.diff(self.time) / np.sqrt(self.zoom[1:] * self.zoom[:-1])
            x = np.append(0, np.cumsum(step))             # of the ground; the nearer, the shorter the way
            self.pan = np.stack([x - x[-1] / 2, 0 * x], -1)
            return
        pan = [np.sin(1.7 * np.pi * self.time + phase[0]), 0.7 * np.sin(1.1 * np.pi * self.time + 0.6 + phase[1])]
        self.pan = recipe.pan * np.stack(pan, -1)             # (T, 2)
        self.zoom = 1 + recipe.zoom * (0.2 + np.sin(1.3 * np.pi * self.time + phase[2]))
        self.roll = recipe.roll * np.sin(1.5 * np.pi * self.time + phase[3])

    def affine(self, path: np.ndarray, depth: float, turn: np.ndarray | float = 0.0) -> np.ndarray:
        """Map from the plane of a layer to each frame `(T, 2, 3)`.

        path: `(T, 2)`; turn: rotation of the layer itself, radians, `(T,)` or constant."""
        center = (np.array(self.size[::-1]) - 1) / 2
        camera = self.zoom[:, None, None] * rotation(self.roll)  # (T, 2, 2)
        way = self.s * self.flip * (path - self.pan / depth)     # (T, 2)
        shift = np.einsum("tij,tj->ti", camera, way) + center
        return np.concatenate([camera @ rotation(turn + 0 * self.time), shift[..., None]], -1)

    def path(self, start: tuple[float, float], move: tuple[float, float]) -> np.ndarray:
        """Straight path `(T, 2)` from start to start + move. `start` is scaled by the frame's aspect ratio."""
        spread = np.array(self.size[::-1]) / self.s
        return np.array(start) * spread + self.time[:, None] * np.array(move)

    def ground(self, palette: str) -> Sheet:
        """An unbounded plane whose texture covers what the camera sees in all frames."""
        affine = self.affine(self.path((0, 0), (0, 0)), 1.0)
        H, W = self.size
        corners = np.array([[-1, -1], [W, -1], [-1, H], [W, H]], np.float64)
        seen = np.concatenate([to_plane(a, corners) for a in affine])  # (4 T, 2)
        low, high = seen.min(axis=0) - 4, seen.max(axis=0) + 4
        shape = np.ceil((high - low) * DENSITY).astype(int)[::-1]
        texture = dead_leaves(tuple(shape), self.rng, palette, 0.14 * self.s * DENSITY)
        return Sheet(affine, texture, low, DENSITY)

    def cut_out(self, affine: np.ndarray, outline: Outline, paint, palette: str, shears=()) -> Sheet:
        """A sheet with an outline. paint: `dead_leaves` or `fibers` of preprocessing/synthetic/textures.py."""
        half = np.array(outline.axes) * (1 + sum(abs(a) for _, a, _ in outline.ripples)) + 4
        shape = np.ceil(2 * half * DENSITY).astype(int)[::-1]
        size = (0.1 * self.s * DENSITY,) if paint is dead_leaves else ()
        return Sheet(affine, paint(tuple(shape), self.rng, palette, *size), -half, DENSITY, outline, shears)

    def waving_sheet(self, palette: str) -> Sheet:
        """A sheet that drifts and deforms by waves in both directions."""
        shears = tuple(
            Shear(axis, share * self.recipe.wave * self.s, length * self.s,
                  self.rng.uniform(0, 2 * np.pi) + speed * 2 * np.pi * self.time)
            for axis, share, length, speed in ((0, 1.0, 0.55, 0.9), (1, 0.9, 0.45, -0.8), (0, 0.4, 0.3, 0.6)))
        travel = self.recipe.travel
        affine = self.affine(self.path((-0.2, 0.27), (travel, -0.3 * travel)), 0.85, 0.15 * np.sin(3 * self.time))
        return self.cut_out(affine, self._outline(0.23, 0.16), fibers, palette, shears)

    def solid(self, palette: str) -> Ellipsoid:
        """An ellipsoid that drifts and rotates, so that parts of its surface turn away from the camera."""
        axes = self.s * np.array([0.18, 0.125, 0.14])
        axis = np.array([0.25, 1.0, 0.2]) + self.rng.uniform(-0.2, 0.2, 3)
        turn = self.recipe.spin * self.time * self.rng.choice([-1, 1])
        pose = rodrigues(axis, turn) @ rodrigues(self.rng.normal(size=3), np.array([self.rng.uniform(0, 6)]))
        travel = self.recipe.travel
        affine = self.affine(self.path((0.27, -0.26), (-0.6 * travel, 0.4 * travel)), 0.92)
        side = int(np.clip(2.2 * axes.max(), 24, 144))
        return Ellipsoid(affine, pose, axes, solid(side, self.rng, palette))

    def companion(self, palette: str) -> Sheet:
        """An object that goes with the camera and turns and circles in the frame."""
        angle = 2 * np.pi * self.time + self.rng.uniform(0, 6)
        circle = self.recipe.travel / self.zoom[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        affine = self.affine(self.pan + circle, 1.0, -0.6 * self.roll)
        return self.cut_out(affine, self._outline(0.17, 0.13), dead_leaves, palette)

    def encounter(self, kind: str, share: float, number: int, palette: str) -> list[Sheet]:
        """An object that is hidden for `share` of the clip, and the trunk in front of it.

        kind: see PLACES; number: index among the scene's encounters; palette: of the object."""
        r, height, aspect = PLACES[tuple(kind for kind, _ in self.recipe.encounters)][number]
        way = swing if kind == "swings" else lambda u: u
        middle = CROSSING if kind == "crosses" else 0.5  # time at which the object is hidden
        free = 0.5 * self.size[1] / self.s if kind == "crosses" else r  # S = 1.1 (free + w)
        limit = 1.1 * way(share / (2 * middle))
        w = (r + limit * free) / (1 - limit)  # solves w - r = S way(share / (2 middle))
        S = 1.1 * (free + w)
        travel = 0.7 * self.recipe.travel
        path = self.path((-0.05 - travel / 2, height + travel / 2), (travel, -travel))
        trunk_path = path - S * way(self.time / middle - 1)[:, None] * (1, -0.2)
        hidden = self.cut_out(self.affine(path, 0.85, 0.15 * self.time), self._outline(r, r, 0.03),
                              dead_leaves, palette)
        nearer = self.cut_out(self.affine(trunk_path, 0.8, 0.06 * np.sin(2 * self.time)),
                              self._outline(1.05 * w, aspect * w, 0.02), fibers, "bark")
        return [hidden, nearer]

    def _outline(self, a: float, b: float, ripple: float = 0.05) -> Outline:
        """An ellipse of half axes a, b with random ripples of relative amplitude `ripple`."""
        waves = ((2, 1.0), (3, 0.8), (5, 0.5))
        ripples = tuple((k, ripple * share, self.rng.uniform(0, 2 * np.pi)) for k, share in waves)
        return Outline((a * self.s, b * self.s), ripples)


def swing(u: np.ndarray | float) -> np.ndarray | float:
    """A smooth version of |u|: 1 at u = -1 and u = 1, 0 at u = 0."""
    return (np.sqrt(u ** 2 + 0.04) - 0.2) / (np.sqrt(1.04) - 0.2)


def rotation(angle: np.ndarray) -> np.ndarray:
    """2D rotation matrices `(T, 2, 2)` for angles `(T,)` in radians."""
    c = np.cos(angle)
    s = np.sin(angle)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def rodrigues(axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """3D rotation matrices `(T, 3, 3)` about `axis` `(3,)` for angles `(T,)` in radians."""
    x, y, z = axis / np.linalg.norm(axis)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle)[:, None, None] * K + (1 - np.cos(angle))[:, None, None] * (K @ K)

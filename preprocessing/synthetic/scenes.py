"""The layout and motion of the synthetic scenes: a camera over a ground, a solid, a waving sheet and crossings.

Notation
    s        shorter side of the frame, pixels; lengths below are shares of it unless said otherwise
    time     t / (T - 1), from 0 to 1: a clip of any length shows the whole story
    path     (T, 2) center of a layer relative to the center of the frame, before the camera moves
    Z        depth of a layer; the ground has 1, and a layer moves 1 / Z times as much when the camera pans

An encounter is an object (radius r) and a wider trunk (half width w) on its nearer side. The trunk's center is at
S way(time) from the object's, with S = 1.1 (r + w), so that the object is free at both ends of the clip
(way = +-1), and hidden where |S way| < w - r. A trunk that crosses has S = 1.1 (0.5 + w): it comes in on one side of
a square frame and leaves on the other within the first 70% of the clip, and hides everything once.
"""

from dataclasses import dataclass

import numpy as np

from preprocessing.synthetic.layers import Ellipsoid, Outline, Shear, Sheet, to_plane
from preprocessing.synthetic.textures import PALETTES, dead_leaves, fibers, solid

CROSSING = 0.35  # time at which a crossing trunk is over its object
DENSITY = 1.4  # texels a pixel: the zoom never shows a texel larger than a pixel


@dataclass(frozen=True)
class Recipe:
    """What distinguishes the scenes. Motions are over the whole clip."""
    pan: float     # half the camera's way
    zoom: float    # share by which the picture grows
    roll: float    # radians
    travel: float  # way of the objects
    wave: float    # amplitude of the sheet's waves
    spin: float    # turn of the solid, radians
    encounters: tuple[tuple[str, float], ...] = ()  # (a kind of `encounter`, share of the clip the object is hidden)


RECIPES = {
    "demo": Recipe(0.025, 0.04, 0.03, 0.02, 0.006, 0.4, (("crosses", 0.045),)),
    "easy": Recipe(0.04, 0.08, 0.04, 0.06, 0.010, 0.6),
    "occlusion": Recipe(0.04, 0.06, 0.05, 0.15, 0.016, 1.2, (("passes", 0.34), ("swings", 0.34))),
    "fast": Recipe(0.12, 0.16, 0.18, 0.30, 0.040, 3.0, (("passes", 0.25),)),
}


# By the kinds of a scene's encounters, each one's r, height in the frame, and length of the trunk over its width.
PLACES = {("crosses",): ((0.04, -0.04, 12.0),), ("passes",): ((0.09, -0.04, 4.5),),
          ("passes", "swings"): ((0.07, -0.22, 1.8), (0.07, 0.22, 1.8))}


def build_layers(scene: str, size: tuple[int, int], num_frames: int, seed: int) -> list[Sheet | Ellipsoid]:
    """The layers of a scene, farthest first; `scene` is a key of RECIPES, `size` (H, W)."""
    recipe, rng = RECIPES[scene], np.random.default_rng(seed)
    stage = _Stage(recipe, size, num_frames, rng)
    names = list(rng.permutation([name for name in PALETTES if name not in ("forest", "bark")]))
    layers = [stage.ground("forest"), stage.solid(names[0]), stage.waving_sheet(names[1])]
    for i, (kind, share) in enumerate(recipe.encounters):
        layers += stage.encounter(kind, share, i, names[2 + i])
    return layers


class _Stage:
    """The camera and what the layers share."""

    def __init__(self, recipe: Recipe, size: tuple[int, int], num_frames: int, rng: np.random.Generator):
        self.recipe, self.size, self.T, self.rng = recipe, size, num_frames, rng
        self.s = min(size)
        self.time = np.arange(num_frames) / (num_frames - 1)  # (T,)
        self.flip = rng.choice([-1.0, 1.0], 2)                # which way round the scene is laid out
        phase = rng.uniform(-0.3, 0.3, 4)
        pan = [np.sin(1.7 * np.pi * self.time + phase[0]), 0.7 * np.sin(1.1 * np.pi * self.time + 0.6 + phase[1])]
        self.pan = recipe.pan * np.stack(pan, -1)             # (T, 2)
        self.zoom = 1 + recipe.zoom * (0.2 + np.sin(1.3 * np.pi * self.time + phase[2]))
        self.roll = recipe.roll * np.sin(1.5 * np.pi * self.time + phase[3])

    def affine(self, path: np.ndarray, depth: float, turn: np.ndarray | float = 0.0) -> np.ndarray:
        """Plane of a layer -> frame `(T, 2, 3)` for a path `(T, 2)` and the layer's own turn in radians."""
        center = (np.array(self.size[::-1]) - 1) / 2
        camera = self.zoom[:, None, None] * rotation(self.roll)  # (T, 2, 2)
        way = self.s * self.flip * (path - self.pan / depth)     # (T, 2)
        shift = np.einsum("tij,tj->ti", camera, way) + center
        return np.concatenate([camera @ rotation(turn + 0 * self.time), shift[..., None]], -1)

    def path(self, start: tuple[float, float], move: tuple[float, float]) -> np.ndarray:
        """From start to start + move `(T, 2)`; in a longer frame the starts are spread over its whole side."""
        spread = np.array(self.size[::-1]) / self.s
        return np.array(start) * spread + self.time[:, None] * np.array(move)

    def ground(self, palette: str) -> Sheet:
        affine = self.affine(self.path((0, 0), (0, 0)), 1.0)
        H, W = self.size
        corners = np.array([[-1, -1], [W, -1], [-1, H], [W, H]], np.float64)
        seen = np.concatenate([to_plane(a, corners) for a in affine])  # (4 T, 2)
        low, high = seen.min(axis=0) - 4, seen.max(axis=0) + 4
        shape = np.ceil((high - low) * DENSITY).astype(int)[::-1]
        texture = dead_leaves(tuple(shape), self.rng, palette, 0.14 * self.s * DENSITY)
        return Sheet(affine, texture, low, DENSITY)

    def cut_out(self, affine: np.ndarray, outline: Outline, paint, palette: str, shears=()) -> Sheet:
        half = np.array(outline.axes) * (1 + sum(abs(a) for _, a, _ in outline.ripples)) + 4
        shape = np.ceil(2 * half * DENSITY).astype(int)[::-1]
        size = (0.1 * self.s * DENSITY,) if paint is dead_leaves else ()
        return Sheet(affine, paint(tuple(shape), self.rng, palette, *size), -half, DENSITY, outline, shears)

    def waving_sheet(self, palette: str) -> Sheet:
        """A sheet that drifts while waves run through it in both directions."""
        shears = tuple(
            Shear(axis, share * self.recipe.wave * self.s, length * self.s,
                  self.rng.uniform(0, 2 * np.pi) + speed * 2 * np.pi * self.time)
            for axis, share, length, speed in ((0, 1.0, 0.55, 0.9), (1, 0.9, 0.45, -0.8), (0, 0.4, 0.3, 0.6)))
        travel = self.recipe.travel
        affine = self.affine(self.path((-0.2, 0.27), (travel, -0.3 * travel)), 0.85, 0.15 * np.sin(3 * self.time))
        return self.cut_out(affine, self._outline(0.23, 0.16), fibers, palette, shears)

    def solid(self, palette: str) -> Ellipsoid:
        """An ellipsoid that turns part of its surface away while it drifts."""
        axes = self.s * np.array([0.18, 0.125, 0.14])
        axis = np.array([0.25, 1.0, 0.2]) + self.rng.uniform(-0.2, 0.2, 3)
        turn = self.recipe.spin * self.time * self.rng.choice([-1, 1])
        pose = rodrigues(axis, turn) @ rodrigues(self.rng.normal(size=3), np.array([self.rng.uniform(0, 6)]))
        travel = self.recipe.travel
        affine = self.affine(self.path((0.27, -0.26), (-0.6 * travel, 0.4 * travel)), 0.92)
        side = int(np.clip(2.2 * axes.max(), 24, 144))
        return Ellipsoid(affine, pose, axes, solid(side, self.rng, palette))

    def encounter(self, kind: str, share: float, number: int, palette: str) -> list[Sheet]:
        """An object that is hidden for `share` of the clip, and the trunk that hides it: it passes by or swings in
        and away again, around the clip's middle, or crosses the frame before. Two encounters share the frame's
        height."""
        r, height, longer = PLACES[tuple(kind for kind, _ in self.recipe.encounters)][number]
        way = swing if kind == "swings" else lambda u: u
        middle, free = (CROSSING, 0.5 * self.size[1] / self.s) if kind == "crosses" else (0.5, r)
        limit = 1.1 * way(share / (2 * middle))
        w = (r + limit * free) / (1 - limit)  # w - r = S way(share)
        reach = 1.1 * (free + w)  # S
        travel = 0.7 * self.recipe.travel
        path = self.path((-0.05 - travel / 2, height + travel / 2), (travel, -travel))
        trunk_path = path - reach * way(self.time / middle - 1)[:, None] * (1, -0.2)
        hidden = self.cut_out(self.affine(path, 0.85, 0.15 * self.time), self._outline(r, r, 0.03),
                              dead_leaves, palette)
        nearer = self.cut_out(self.affine(trunk_path, 0.8, 0.06 * np.sin(2 * self.time)),
                              self._outline(1.05 * w, longer * w, 0.02), fibers, "bark")
        return [hidden, nearer]

    def _outline(self, a: float, b: float, ripple: float = 0.05) -> Outline:
        waves = ((2, 1.0), (3, 0.8), (5, 0.5))
        ripples = tuple((k, ripple * share, self.rng.uniform(0, 2 * np.pi)) for k, share in waves)
        return Outline((a * self.s, b * self.s), ripples)


def swing(u: np.ndarray | float) -> np.ndarray | float:
    """From 1 at u = -1 to 0 and back to 1, at an almost even speed with a soft turn."""
    return (np.sqrt(u ** 2 + 0.04) - 0.2) / (np.sqrt(1.04) - 0.2)


def rotation(angle: np.ndarray) -> np.ndarray:
    """Rotations of the plane `(T, 2, 2)` from radians `(T,)`."""
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def rodrigues(axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotations of space `(T, 3, 3)` about `axis` `(3,)` by radians `(T,)`."""
    x, y, z = axis / np.linalg.norm(axis)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle)[:, None, None] * K + (1 - np.cos(angle))[:, None, None] * (K @ K)

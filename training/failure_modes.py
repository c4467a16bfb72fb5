"""The two ways in which OmniMotion's authors saw runs fail, found from what the correspondences say.

Notation
    p, q     where a point is in frames i and j, by a cycle-consistent correspondence: it is visible in both   (N, 2)
    x        where the model maps p to: the sample of the largest weight, at pixel x and depth z of frame j    (N, 2)
    missed   |x - q| is more than `MISS` of the frame's longer side
    hidden   not missed, but more than half of the light at q is absorbed in front of z: the model has another
             surface before one that is seen there. Many of these late in a run: a wrong surface order
    twice    missed, though the model shows the same opaque color at p and at q. Where points of adjacent frames are
             mapped well and those of distant frames are at two places of the canonical volume, an object is in it twice
"""

import json
import logging
from dataclasses import asdict, dataclass

import numpy as np
import torch

from common.files import write_text
from models.omnimotion import OmniMotion

log = logging.getLogger("train")
MISS = 0.03          # of the longer side
SAME_COLOR = 0.1    # largest difference of the mean over channels
OPAQUE = 0.5
PAIRS, POINTS = 16, 200  # looked at of adjacent and of distant frames: pairs, points a pair
MANY = 0.15          # share of points from which on there is a warning
LEAST_STEPS = 100    # of a run that is examined: a shorter one is made in less time than that takes
FITTED = 0.05        # largest share of missed points of adjacent frames for a model that is fitted at all


@dataclass
class Shares:
    """Shares of visible points, in adjacent (near) and in distant (far) frames, and the median error of both, px."""
    near_missed: float
    far_missed: float
    hidden: float
    twice: float
    error: float

    def warnings(self) -> list[str]:
        """What is wrong and what to try, one line each."""
        out = []
        if self.hidden > MANY:
            out.append(f"wrong surface order: {self.hidden:.0%} of the points that are seen in two frames are behind "
                       "another surface in the model. If later warnings say the same, it will not recover: try "
                       "--mask_near, another --seed (python -m benchmarks.seeds), or a depth prior (--init_depth)")
        if self.near_missed < FITTED and self.twice > MANY:
            out.append(f"an object is in the canonical volume twice: {self.twice:.0%} of the points that distant "
                       "frames have in common are at two places of it, of the same color. Try another --seed, a "
                       "larger --start_interval, or longer correspondences (preprocessing --chain, --features dino)")
        return out


@torch.no_grad()
def point_outcomes(model: OmniMotion, i: int, j: int, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(missed, hidden, twice, error in pixels) of points `(N, 2)`, `(4, N)` float."""
    device = p.device
    ids = [torch.tensor([t], device=device) for t in (i, j)]
    x, z = model.correspond(p[None], *ids, use_max_loc=True)
    error = (x[0] - q).norm(dim=-1)
    missed = error > MISS * max(model.size)
    hidden = ~missed & (model.occlusion_score(q[None], z, ids[1])[0] > 0.5)
    rgb, opacity = zip(*(color_and_opacity(model, points, t) for points, t in ((p, ids[0]), (q, ids[1]))), strict=True)
    alike = ((rgb[0] - rgb[1]).abs().mean(-1) < SAME_COLOR) & (torch.minimum(*opacity) > OPAQUE)
    return torch.stack([missed.float(), hidden.float(), (missed & alike).float(), error])


def color_and_opacity(model: OmniMotion, pixels: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rendered colors `(N, 3)` and absorbed light `(N,)` at pixels `(N, 2)` of frame `t` `(1,)`."""
    rgb, weights = model.render(model.maps(t).rays_to_canonical(model.lift(pixels[None])))
    return (weights[..., None] * rgb).sum(-2)[0], weights.sum(-1)[0]


def examine(model: OmniMotion, store, seed: int) -> Shares | None:
    """Shares of points over pairs that are drawn from a correspondence store; None if it has no visible points.

    Distant frames are the farther half of the stored intervals."""
    rng = np.random.default_rng(seed)
    device = next(model.parameters()).device
    pairs = np.array([(i, j) for i, j in store.pairs if store.counts[i, j]])
    if not len(pairs):
        return None
    interval = np.abs(pairs[:, 0] - pairs[:, 1])
    found = {}
    for name, chosen in (("near", interval == interval.min()), ("far", interval >= np.median(interval))):
        rows = np.flatnonzero(chosen)
        parts = [_outcomes(model, store, *pairs[k], rng, device)
                 for k in rng.choice(rows, min(PAIRS, len(rows)), replace=False)]
        found[name] = torch.cat(parts, dim=1)
    if not all(part.shape[1] for part in found.values()):
        return None
    near, far = (found[name].mean(1).tolist() for name in ("near", "far"))
    both = torch.cat(list(found.values()), dim=1)
    return Shares(near[0], far[0], max(near[1], far[1]), far[2], both[3].median().item())


def _outcomes(model: OmniMotion, store, i: int, j: int, rng, device: torch.device) -> torch.Tensor:
    stored, W = store.stored(int(i), int(j)), model.size[1]
    rows = np.flatnonzero(stored.cycle)
    rows = np.sort(rng.choice(rows, min(POINTS, len(rows)), replace=False))
    pixels = stored.pixels[rows]
    p = np.stack([pixels % W, pixels // W], axis=-1).astype(np.float32)
    q = p + stored.flow(rows)
    return point_outcomes(model, int(i), int(j), *(torch.from_numpy(a.astype(np.float32)).to(device) for a in (p, q)))


def watch(trainer) -> None:
    """Examine a run of LEAST_STEPS when it is time, at half of its steps, each eighth after, and its end: warnings, and
    all findings in its diagnosis.json. It draws nothing from the run's generators."""
    num_iters, path = trainer.options.num_iters, trainer.dir / "diagnosis.json"
    if num_iters < LEAST_STEPS or trainer.step not in {num_iters - k * num_iters // 8 for k in range(5)}:
        return
    shares = examine(trainer.model, trainer.sampler.store, trainer.options.seed + trainer.step)
    if shares is None:
        return
    earlier = json.loads(path.read_text()) if path.is_file() else []
    found = {"step": trainer.step, **asdict(shares), "warnings": shares.warnings()}
    write_text(path, json.dumps([*(f for f in earlier if f["step"] < trainer.step), found], indent=1) + "\n")
    for line in found["warnings"]:
        log.warning("step %d: %s", trainer.step, line)

"""Detect the two failure modes that the OmniMotion authors describe, by comparing the model with the correspondences.

Notation
    p, q     ends of a cycle-consistent correspondence, pixels in frames i and j; the point is visible in both  (N, 2)
    x, z     pixel and depth in frame j to which the model maps the sample of p with the largest weight  (N, 2), (N,)
    missed   |x - q| is larger than `MISS` times the frame's longer side
    hidden   not missed, but more than half of the light at q is absorbed in front of z: the model has another surface
             in front of a visible one. Many hidden points late in a run mean a wrong surface order
    twice    missed, although the model renders the same opaque color at p and at q. If points of adjacent frames are
             mapped well and many points of distant frames are `twice`, the volume holds two copies of an object
"""

import json
import logging
from dataclasses import asdict, dataclass

import numpy as np
import torch

from common.files import write_text
from models.omnimotion import OmniMotion
from training.run_metadata import read_entries

log = logging.getLogger("train")
MISS = 0.03          # largest error of a point that is not missed, as a fraction of the longer side
SAME_COLOR = 0.1     # colors in [0, 1]: the mean absolute difference over channels is below this
OPAQUE = 0.5         # smallest absorbed light of an opaque pixel, in [0, 1]
PAIRS = 16           # pairs drawn in each group (adjacent, distant)
POINTS = 200         # points drawn per pair
WARNING_SHARE = 0.15  # a warning is logged above this share of points
MIN_STEPS = 100      # shorter runs are not examined, because the examination takes longer than training them again
FITTED = 0.05        # the model counts as fitted below this share of missed points in adjacent frames


@dataclass
class Shares:
    """Shares (0 to 1) of visible points in adjacent (near) and distant (far) frames, and the median error in pixels."""
    near_missed: float
    far_missed: float
    hidden: float
    twice: float
    error: float

    def warnings(self) -> list[str]:
        """One line for each failure mode found, with a remedy."""
        out = []
        if self.hidden > WARNING_SHARE:
            out.append(f"wrong surface order: {self.hidden:.0%} of the points that are seen in two frames are behind "
                       "another surface in the model. If later warnings say the same, it will not recover: try "
                       "--mask_near, another --seed (python -m benchmarks.seeds), or a depth prior (--init_depth)")
        if self.near_missed < FITTED and self.twice > WARNING_SHARE:
            out.append(f"an object is in the canonical volume twice: {self.twice:.0%} of the points that distant "
                       "frames have in common are at two places of it, of the same color. Try another --seed, a "
                       "larger --start_interval, or longer correspondences (preprocessing --chain, --features dino)")
        return out


@torch.no_grad()
def point_outcomes(model: OmniMotion, i: int, j: int, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Outcomes of points `p`, `q` `(N, 2)` of frames `i`, `j`: `(4, N)` float with the rows missed, hidden, twice (0 or
    1), and the error in pixels."""
    id_i = torch.tensor([i], device=p.device)
    id_j = torch.tensor([j], device=p.device)
    x, z = model.correspond(p[None], id_i, id_j, use_max_loc=True)  # (1, N, 2), (1, N)
    error = (x[0] - q).norm(dim=-1)
    missed = error > MISS * max(model.size)
    hidden = ~missed & (model.occlusion_score(q[None], z, id_j)[0] > 0.5)
    color_p, opacity_p = color_and_opacity(model, p, id_i)
    color_q, opacity_q = color_and_opacity(model, q, id_j)
    same_color = (color_p - color_q).abs().mean(-1) < SAME_COLOR
    opaque = torch.minimum(opacity_p, opacity_q) > OPAQUE
    return torch.stack([missed.float(), hidden.float(), (missed & same_color & opaque).float(), error])


def color_and_opacity(model: OmniMotion, pixels: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rendered colors `(N, 3)` and absorbed light `(N,)` at pixels `(N, 2)` of frame `t` `(1,)`."""
    rgb, weights = model.render(model.maps(t).rays_to_canonical(model.lift(pixels[None])))
    return (weights[..., None] * rgb).sum(-2)[0], weights.sum(-1)[0]


def examine(model: OmniMotion, store, seed: int) -> Shares | None:
    """Shares over random pairs of a correspondence store; None if no cycle-consistent point is found in one of the two
    groups of pairs.

    The pairs of adjacent frames are those with the smallest stored interval; the pairs of distant frames are those with
    at least the median interval."""
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
    near_missed, near_hidden, _, _ = found["near"].mean(1).tolist()
    far_missed, far_hidden, far_twice, _ = found["far"].mean(1).tolist()
    errors = torch.cat([found["near"][3], found["far"][3]])
    return Shares(near_missed, far_missed, max(near_hidden, far_hidden), far_twice, errors.median().item())


def _outcomes(model: OmniMotion, store, i: int, j: int, rng, device: torch.device) -> torch.Tensor:
    """`point_outcomes` of random cycle-consistent points of a pair; `(4, 0)` if the pair has none."""
    stored = store.stored(int(i), int(j))
    rows = np.flatnonzero(stored.cycle)
    if not len(rows):
        return torch.zeros(4, 0, device=device)
    rows = np.sort(rng.choice(rows, min(POINTS, len(rows)), replace=False))
    y, x = np.divmod(stored.pixels[rows], model.size[1])
    p = np.stack([x, y], axis=-1).astype(np.float32)
    q = (p + stored.flow(rows)).astype(np.float32)
    return point_outcomes(model, int(i), int(j), torch.from_numpy(p).to(device), torch.from_numpy(q).to(device))


def diagnosis_due(step: int, num_iters: int) -> bool:
    """Whether a run is examined after `step` steps: at half of its steps, then after every eighth of them, and at the
    end. Runs below MIN_STEPS are not examined."""
    return num_iters >= MIN_STEPS and step in {num_iters - k * num_iters // 8 for k in range(5)}


def diagnose(trainer) -> None:
    """Examine the model, add the findings to diagnosis.json, and log warnings. The run's random generators are not
    used."""
    shares = examine(trainer.model, trainer.sampler.store, trainer.options.seed + trainer.step)
    if shares is None:
        return
    path = trainer.dir / "diagnosis.json"
    earlier = [entry for entry in read_entries(path) if entry["step"] < trainer.step]
    found = {"step": trainer.step, **asdict(shares), "warnings": shares.warnings()}
    write_text(path, json.dumps([*earlier, found], indent=1) + "\n")
    for line in found["warnings"]:
        log.warning("step %d: %s", trainer.step, line)

"""Diagnosis of a model: the two failure modes that the OmniMotion authors describe, found by comparing the model with
the correspondences, and how many positions its maps do not bring back.

Notation
    p, q     ends of a cycle-consistent correspondence, pixels in frames i and j; the point is visible in both  (N, 2)
    x, z     pixel and depth in frame j to which the model maps the sample of p with the largest weight  (N, 2), (N,)
    missed   |x - q| is larger than `MISS` times the frame's longer side
    hidden   not missed, but more than half of the light at q is absorbed in front of z: the model has another surface
             in front of a visible one. Many hidden points late in a run mean a wrong surface order
    twice    missed, although the model renders the same opaque color at p and at q. If points of adjacent frames are
             mapped well and many points of distant frames are `twice`, the volume holds two copies of an object
    not invertible   a position of a frame that is mapped to the canonical volume and back, and ends more than
             `MAX_ROUND_TRIP` pixels from where it started
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.files import write_text
from models.coords import denormalize_pixels
from models.omnimotion import OmniMotion
from training.run_metadata import read_entries

log = logging.getLogger("train")
FILE = "diagnosis.json"
MISS = 0.03          # largest error of a point that is not missed, as a fraction of the longer side
SAME_COLOR = 0.1     # colors in [0, 1]: the mean absolute difference over channels is below this
OPAQUE = 0.5         # smallest absorbed light of an opaque pixel, in [0, 1]
PAIRS = 16           # pairs drawn in each group (adjacent, distant)
POINTS = 200         # points drawn per pair
WARNING_SHARE = 0.15  # a warning is logged above this share of points
MIN_STEPS = 100      # shorter runs are not examined, because the examination takes longer than training them again
FITTED = 0.05        # the model counts as fitted below this share of missed points in adjacent frames
ROUND_TRIP_SIDE = 65  # positions along each side of a frame that are mapped to the canonical volume and back
MAX_ROUND_TRIP = 1.0  # pixels
MAX_NOT_INVERTIBLE = 0.001  # a warning is logged above this share of positions, in any frame
MLP_DEPTHS = 2       # depths of the positions of a model without motion layers (deform = mlp)


class Finding(NamedTuple):
    """A failure of a model, and what to do about it, in one line each."""
    failure: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.failure}. {self.remedy}"


@dataclass
class Shares:
    """Shares (0 to 1) of visible points in adjacent (near) and distant (far) frames, and the median error in pixels."""
    near_missed: float
    far_missed: float
    hidden: float
    twice: float
    error: float

    def findings(self) -> list[Finding]:
        """The failure modes found."""
        out = []
        if self.hidden > WARNING_SHARE:
            out.append(Finding(
                f"wrong surface order: {self.hidden:.0%} of the points that are seen in two frames are behind another "
                "surface in the model",
                "Train again from the start (train.py --no-reload) with --mask_near, another --seed (python -m "
                "benchmarks.seeds), or a depth prior (--init_depth)"))
        if self.near_missed < FITTED and self.twice > WARNING_SHARE:
            out.append(Finding(
                f"an object is in the canonical volume twice: {self.twice:.0%} of the points that distant frames have "
                "in common are at two places of it, of the same color",
                "Train again from the start (train.py --no-reload) with another --seed or a larger --start_interval, "
                "or on longer correspondences (preprocessing --features dino)"))
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


@torch.no_grad()
def not_invertible(model: OmniMotion) -> dict[str, list[float]]:
    """Shares (0 to 1) of positions that do not come back from the canonical volume, for the "first", "middle" and
    "last" frame: one share for each motion layer, nearest first, or for each of MLP_DEPTHS depth ranges.

    The positions are ROUND_TRIP_SIDE x ROUND_TRIP_SIDE over the whole frame, in the middle of the layer's depths. A
    result that is not finite has not come back."""
    config = model.config
    device = next(model.parameters()).device
    layers = MLP_DEPTHS if config.deform == "mlp" else config.grid_layers
    side = torch.linspace(-1, 1, ROUND_TRIP_SIDE, device=device)
    y, x = torch.meshgrid(side, side, indexing="ij")
    shares = {}
    for name, t in (("first", 0), ("middle", config.num_frames // 2), ("last", config.num_frames - 1)):
        maps = model.maps(torch.tensor([t], device=device))
        shares[name] = []
        for layer in range(layers):
            depth = config.min_depth + (layer + 0.5) / layers * (config.max_depth - config.min_depth)
            start = torch.stack([x, y, torch.full_like(x, depth)], dim=-1).reshape(1, -1, 3)
            end = maps.to_local(maps.to_canonical(start))
            moved = denormalize_pixels(end[..., :2], model.size) - denormalize_pixels(start[..., :2], model.size)
            back = moved.norm(dim=-1) <= MAX_ROUND_TRIP  # False for NaN
            shares[name].append(1 - back.float().mean().item())
    return shares


def invertibility_findings(shares: dict[str, list[float]]) -> list[Finding]:
    """What to say about the result of `not_invertible`: nothing, or one finding about the worst frame and layer."""
    worst = max(shares, key=lambda name: max(shares[name]))
    share = max(shares[worst])
    if share <= MAX_NOT_INVERTIBLE:
        return []
    return [Finding(
        f"maps are not invertible: {share:.1%} of the positions of the {worst} frame do not come back from the "
        f"canonical volume (more than {MAX_ROUND_TRIP:g} px off)",
        "Do not trust tracks through such positions. --deform warp (configs/fast.txt) and --deform mlp with "
        "--precision fp32 are invertible except for rounding")]


def diagnosis_due(step: int, num_iters: int) -> bool:
    """Whether a run is examined after `step` steps: at half of its steps, then after every eighth of them, and at the
    end. Runs below MIN_STEPS are not examined."""
    return num_iters >= MIN_STEPS and step in {num_iters - k * num_iters // 8 for k in range(5)}


def diagnose(trainer) -> None:
    """Examine the model, add an entry to diagnosis.json, and log the failures found, except after the last step:
    train.py reports these at the end. The run's random generators are not used."""
    shares = examine(trainer.model, trainer.sampler.store, trainer.options.seed + trainer.step)
    round_trips = not_invertible(trainer.model)
    findings = [*(shares.findings() if shares else []), *invertibility_findings(round_trips)]
    earlier = [entry for entry in _entries(trainer.dir) if entry["step"] < trainer.step]
    found = {"step": trainer.step, **(asdict(shares) if shares else {}),
             "not_invertible": max(map(max, round_trips.values())), "not_invertible_in_frames": round_trips,
             "warnings": [str(finding) for finding in findings]}
    write_text(trainer.dir / FILE, json.dumps([*earlier, found], indent=1) + "\n")
    if trainer.step < trainer.options.num_iters:
        for finding in findings:
            log.info("step %d, not the last: %s", trainer.step, finding.failure)


def diagnosis_at(run_dir: Path, step: int) -> dict | None:
    """The newest entry of a run's diagnosis.json that is not later than `step`; None if there is none."""
    entries = [entry for entry in _entries(run_dir) if entry["step"] <= step]
    return entries[-1] if entries else None


def failures_at(run_dir: Path, step: int) -> list[str]:
    """The failures that `diagnosis_at` names, one line each."""
    return (diagnosis_at(run_dir, step) or {"warnings": []})["warnings"]


def _entries(run_dir: Path) -> list[dict]:
    """The entries of a run's diagnosis.json; none if it is missing or damaged."""
    entries = read_entries(run_dir / FILE)
    complete = all(isinstance(entry, dict) and isinstance(entry.get("step"), int)
                   and isinstance(entry.get("warnings"), list) for entry in entries)
    return entries if complete else []

"""CoTracker (Karaev et al., ECCV 2024; CoTracker3, 2024): its published predictor, through torch.hub.

The predictor is its authors' code, from a local checkout or fetched from GitHub, and is run as it is: whoever can
write there can do here what the user can. Its weights are loaded by us, from a file that was checked, and as tensors
only.
"""

from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from third_party.torch_files import tensors_by_name

REPOSITORY, ENTRY = "facebookresearch/co-tracker", "cotracker3_offline"


class CoTracker:
    """`(video, queries) -> (tracks, visible)` of the offline predictor.

    checkout: a local checkout of the repository; None: torch.hub fetches and trusts it.
    weights: the entry's published file.
    UserError if either cannot be had or they do not fit each other."""

    def __init__(self, weights: Path, checkout: Path | None = None, device: str = "cpu"):
        if checkout is not None and not (checkout / "hubconf.py").is_file():
            raise UserError(f"{checkout} is not a checkout of {REPOSITORY}: it has no hubconf.py")
        source = {"source": "local"} if checkout else {"source": "github", "trust_repo": True}
        try:
            self.predictor = torch.hub.load(str(checkout or REPOSITORY), ENTRY, pretrained=False, **source)
            self.predictor.model.load_state_dict(tensors_by_name(weights))
        except Exception as error:  # other people's code, a network, a file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"CoTracker cannot be loaded from {checkout or REPOSITORY} with {weights} ({reason}): give "
                            "a local checkout (--cotracker DIR), its requirements and its weights") from error
        self.predictor, self.device = self.predictor.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, video: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query points `(N, 3)` = (t, y, x) through a video `(T, H, W, 3)` uint8, before and after their frames.

        Returns tracks `(N, T, 2)` float32 pixels and visible `(N, T)` bool."""
        frames = torch.from_numpy(video).to(self.device).permute(0, 3, 1, 2)[None].float()  # (1, T, 3, H, W)
        points = torch.from_numpy(np.ascontiguousarray(queries[:, [0, 2, 1]], np.float32)).to(self.device)[None]
        tracks, visible = self.predictor(frames, queries=points, backward_tracking=True)  # (1, T, N, 2), (1, T, N)
        return tracks[0].transpose(0, 1).float().cpu().numpy(), visible[0].T.bool().cpu().numpy()

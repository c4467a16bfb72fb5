"""CoTracker3's offline predictor (Karaev et al., ECCV 2024; CoTracker3, 2024), loaded with torch.hub.

Security: the predictor is its authors' code, from a local checkout or from GitHub. It runs with all rights of the user.
Its weights are loaded here, with `weights_only=True`, from a file whose checksum is verified when it is downloaded.
"""

from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.torch_files import tensors_by_name

REPOSITORY = "facebookresearch/co-tracker"
ENTRY = "cotracker3_offline"  # function of the repository's hubconf.py


class CoTracker:
    """`(video, queries) -> (tracks, visible)`.

    weights: file of the predictor's weights. checkout: local checkout of the repository; None: torch.hub downloads the
    repository and runs it. UserError if the code or the weights cannot be loaded."""

    def __init__(self, weights: Path, checkout: Path | None = None, device: str = "cpu"):
        if checkout is not None and not (checkout / "hubconf.py").is_file():
            raise UserError(f"{checkout} is not a checkout of {REPOSITORY}: it has no hubconf.py")
        source = {"source": "local"} if checkout else {"source": "github", "trust_repo": True}
        try:
            self.predictor = torch.hub.load(str(checkout or REPOSITORY), ENTRY, pretrained=False, **source)
            self.predictor.model.load_state_dict(tensors_by_name(weights))
        except Exception as error:  # the repository's code, the network and the file may raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"CoTracker cannot be loaded from {checkout or REPOSITORY} with {weights} ({reason}): give "
                            "a local checkout (--cotracker DIR), its requirements and its weights") from error
        self.predictor = self.predictor.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def __call__(self, video: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Track query points `(N, 3)` = (t, y, x) through a video `(T, H, W, 3)` uint8, forward and backward in time.

        Returns tracks `(N, T, 2)` float32 pixels and visible `(N, T)` bool."""
        frames = torch.from_numpy(video).to(self.device).permute(0, 3, 1, 2)[None].float()  # (1, T, 3, H, W)
        points = torch.from_numpy(np.ascontiguousarray(queries[:, [0, 2, 1]], np.float32)).to(self.device)[None]
        tracks, visible = self.predictor(frames, queries=points, backward_tracking=True)  # (1, T, N, 2), (1, T, N)
        return tracks[0].transpose(0, 1).float().cpu().numpy(), visible[0].T.bool().cpu().numpy()

"""Conversion between the correspondence store and OmniMotion's layout (see loaders/omnimotion_layout.py).

Flow is exact up to the store's rounding of 1/32 px. OmniMotion's layout has flow at all pixels; for frames that are not
adjacent, the store has flow only at pixels with a cycle or occlusion flag, and the others become 0.
"""

import json
import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import write_text
from loaders.correspondences import FOLDER, CorrespondenceStore, open_correspondences
from loaders.images import write_png
from loaders.npy import save_npy
from loaders.omnimotion_layout import OmniMotionFolder, has_omnimotion_layout
from loaders.scenes import CONVERTED_FILE, read_scenes
from loaders.sequence import VideoSequence
from preprocessing.correspondence_writer import StoreWriter
from preprocessing.pair_selection import check_disk

log = logging.getLogger(__name__)


def convert(sequence: VideoSequence, layout: str, resume: bool = False) -> None:
    """Write the sequence's correspondences in `layout` ("store" or "omnimotion"); the original files stay.

    UserError if there are no correspondences in the other layout, or if `layout` exists already (OmniMotion's layout:
    unless `resume`)."""
    has_store = (sequence.root / FOLDER / "meta.json").is_file()
    if layout == "omnimotion":
        if has_omnimotion_layout(sequence.root) and not resume:
            raise UserError(f"{sequence.root} has OmniMotion's folders already: remove flow_stats.json to write them "
                            "again")
        if not has_store:
            raise UserError(f"no store in {sequence.root / FOLDER} to convert: run `python -m preprocessing` first")
        to_omnimotion_layout(sequence, open_correspondences(sequence))
    else:
        if has_store:
            raise UserError(f"{sequence.root / FOLDER} exists already: remove it to convert again")
        if not has_omnimotion_layout(sequence.root):
            raise UserError(f"{sequence.root} does not have OmniMotion's layout: it needs flow_stats.json and "
                            "raft_exhaustive/")
        to_store(sequence, OmniMotionFolder(sequence), resume)


def to_omnimotion_layout(sequence: VideoSequence, store: CorrespondenceStore) -> None:
    """Write raft_exhaustive/, raft_masks/, count_maps/, scenes.json if there are cuts or blank frames, and,
    last, flow_stats.json.

    UserError if the disk is too small.
    Files that exist already are kept, so a run that was killed can be continued."""
    root = sequence.root
    names = sequence.names
    pair_bytes = 8 * sequence.size[0] * sequence.size[1] + 4096  # float32 flow, and about 4 KiB of masks
    done = sum(path.stat().st_size for path in (root / "raft_exhaustive").glob("[!.]*"))
    check_disk(len(store.pairs) * pair_bytes, root, done)
    stats: dict[str, dict[str, int]] = {name: {} for name in names}
    for i, j in tqdm(store.pairs.tolist(), desc="OmniMotion's layout"):
        stats[names[i]][names[j]] = int(store.counts[i, j])
        flow = root / "raft_exhaustive" / f"{names[i]}_{names[j]}.npy"
        masks = root / "raft_masks" / f"{names[i]}_{names[j]}.png"
        if flow.is_file() and masks.is_file():
            continue
        pair = store.dense(i, j)
        save_npy(flow, pair.flow)
        channels = [pair.cycle, pair.occlusion, np.zeros_like(pair.cycle)]  # red, green, blue
        write_png(masks, np.stack(channels, axis=-1).astype(np.uint8) * 255)
    for i, name in enumerate(names):
        write_png(root / "count_maps" / Path(name).with_suffix(".png"), store.count_map(i))
    scenes = read_scenes(sequence)
    if not scenes.same_throughout:
        write_text(root / CONVERTED_FILE, json.dumps({"names": names, "scenes": scenes.as_dict()}))
    write_text(root / "flow_stats.json", json.dumps(stats))


def to_store(sequence: VideoSequence, source: OmniMotionFolder, resume: bool = False) -> None:
    """Write a store from OmniMotion's layout."""
    writer = StoreWriter(sequence, {"flow": "omnimotion", "source": "converted from the published layout"}, resume,
                         lambda: read_scenes(sequence))
    for i, j in tqdm(source.pairs.tolist(), desc="store"):
        if not writer.has(i, j):
            pair = source.dense(i, j)
            writer.write(i, j, pair.flow, pair.cycle, pair.occlusion)
    writer.finish()

"""Every option of train.py, eval.py and viz.py, once: name, default, help, by group.

A config file (`--config configs/default.txt`) holds `name = value` lines; flags on the command line win over it.
Options that count steps are steps of the published 100,000-step run: a run of `num_iters` steps scales them all.
"""

import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from pathlib import Path

import configargparse

from common.errors import UserError, os_error_line
from loaders.images import MAX_PIXELS, limit_pixels

OPTIONS = {
    "general": [
        ("data_dir", str, "", "sequence folder (color/ and correspondences/, or OmniMotion's published layout)"),
        ("expname", str, "default", "name of the experiment; results go to SAVE_DIR/EXPNAME_SEQUENCE"),
        ("save_dir", str, "out", "folder of all results"),
        ("ckpt_path", str, "", "eval, viz: the checkpoint to look at, else the run's newest; "
         "train: a model that a new run starts from"),
        ("no_reload", bool, False, "start from scratch even if the run's folder has a checkpoint"),
        ("device", ("auto", "cpu", "cuda"), "auto", "where to compute; auto is CUDA where there is one"),
        ("precision", ("auto", "fp32", "tf32", "bf16"), "auto", "of the networks' matrix products; auto is bf16 where "
         "the hardware has it, else fp32. Coordinates, depths and losses are float32 always"),
        ("mlp_backend", ("auto", "torch", "native", "triton", "tcnn"), "auto", "kernels of the networks: PyTorch; C++ "
         "for CPUs with AMX; Triton or tiny-cuda-nn for CUDA; auto is native where it can be, else PyTorch"),
        ("compile", ("", "inductor", "aot_eager"), "", "compile the forward pass and the losses with this backend of "
         "torch.compile; inductor uses CUDA graphs on a GPU"),
        ("seed", int, 1234, "seed of everything random"),
        ("num_iters", int, 100_000, "number of training steps; all schedules are shares of it"),
        ("max_pixels", int, MAX_PIXELS, "refuse larger images and video frames"),
    ],
    "data": [
        ("num_imgs", int, 250, "use at most this many frames"),
        ("resident", ("auto", "yes", "no"), "auto", "keep frames and correspondences on the GPU; auto: where they fill "
         "at most half of its free memory"),
        ("num_pairs", int, 8, "pairs of frames a step, of all processes together; a multiple of their number"),
        ("num_pts", int, 256, "points a pair"),
        ("start_interval", int, 20, "largest distance between the frames of a pair at the start of the curriculum"),
        ("neighbor_weight", float, 0.5, "weight of each adjacent frame when the partner of a frame is drawn"),
        ("use_count_map", int, 1, "before the first error map, draw pixels by 1/sqrt(valid correspondences + 1)"),
        ("error_map", ("accumulated", "last", "off"), "accumulated", "hard mining: add up errors over the whole run, "
         "keep only the last evaluation (OmniMotion), or none"),
        ("error_map_cell", int, 8, "side of an error map's cell in pixels"),
        ("error_map_uniform", float, 0.1, "share of draws that ignores the error map: every pixel stays reachable"),
        ("error_map_random", float, 0.0, "share of the points that is replaced by random ones (OmniMotion: 0.5)"),
        ("i_cache", int, 20_000, "published steps between full evaluations for the error map"),
    ],
    "model": [
        ("num_samples_ray", int, 32, "samples a ray"),
        ("min_depth", float, 0.0, "nearest depth"),
        ("max_depth", float, 2.0, "farthest depth"),
        ("deform", ("mlp", "grid"), "mlp", "maps between frames and canonical volume: coupling layers whose scales and "
         "shifts MLPs compute from a time latent, or space-time grids of displacements, which are far cheaper"),
        ("grid_levels", int, 6, "deform = grid: levels of the grids, with sides of 3, 5, 9, ... vertices"),
        ("grid_layers", int, 0, "deform = grid: layers of motion, one behind the other; 0: 2, with --init_layers 1 a "
         "third in front where something crosses the picture"),
        ("field", ("gabor", "grid"), "gabor", "canonical field: a Gabor network, or grids"),
        ("time_latent", ("hash", "gabor", "table"), "hash", "network of the frames' latents"),
        ("latent_dim", int, 128, "size of a frame's latent"),
        ("coupling_width", int, 256, "width of the coupling layers' networks"),
        ("coupling_layers", int, 2, "hidden layers of a coupling's MLP"),
        ("projection_layers", int, 2, "layers of the coupling's projection; 1 is OmniMotion's"),
        ("pe_freq", int, 4, "octaves of the coupling layers' encoding"),
        ("use_affine", int, 1, "affine map of x and y beside the coupling layers; grids have theirs always"),
        ("affine_width", int, 256, "width of the affine map's MLP"),
        ("affine_layers", int, 8, "linear layers of the affine map's MLP"),
        ("field_width", int, 256, "width of the canonical field"),
        ("field_layers", int, 3, "hidden layers of the canonical field"),
        ("field_encoding", ("periodic", "nerf", "none"), "periodic", "code of canonical points: periodic, 66-d; "
         "nerf, 63-d (the coordinates and 10 octaves); or none"),
    ],
    "optimization": [
        ("optimizer", ("adam", "muon"), "adam", "Adam, as published, or Muon for the invertible network's matrices"),
        ("lr_feature", float, 1e-3, "learning rate of the time latent"),
        ("lr_deform", float, 1e-4, "learning rate of the invertible network"),
        ("lr_color", float, 3e-4, "learning rate of the canonical field"),
        ("lrate_decay_steps", float, 20_000, "published steps between decays of the learning rates"),
        ("lrate_decay_factor", float, 0.5, "factor of a decay"),
        ("lrate_warmup_steps", float, 0.0, "published steps over which the learning rates rise from 0"),
        ("grad_clip", float, 1_000.0, "largest norm of the gradient, far above those of a healthy run; 0: no clipping"),
        ("deform_start", float, 0.0, "published step at which the maps between frames and canonical volume begin to "
         "learn; before it, the field learns alone"),
        ("freeze_step", float, 40_000, "published step at which the time latents are frozen; 0: never"),
        ("distortion_start", float, 40_000, "published step at which the distortion loss begins"),
        ("w_smoothness", float, 0.0, "weight of OmniMotion's scene-flow smoothness loss (published: 20)"),
        ("w_depth", float, 0.0, "weight of the depth prior's loss (`python -m preprocessing --depth` makes the prior)"),
        ("init_layers", int, 0, "deform = grid: 1 starts from the background's motion behind that of what moves; with "
         "field = grid correspondences vote which of them each place shows"),
        ("init_depth", bool, False, "start with surfaces near the depth prior"),
        ("recompute_above", int, 32_768, "on the CPU: samples a step (pairs x points x samples on a ray) above which "
         "activations are computed again in the backward pass instead of stored"),
        ("max_padding", float, 0.0, "predictions farther than this outside the frame have no flow loss, in pixels"),
        ("mask_near", bool, False, "hide the nearest fifth of the samples for the first 4,000 published steps"),
    ],
    "inference": [
        ("use_max_loc", int, 1, "follow the sample of the largest weight instead of compositing the ray"),
        ("follow_flow", int, 0, "1: tracks go with the flow of the sequence's correspondences where that can be "
         "trusted, and as a rule with the model elsewhere"),
        ("occlusion_th", float, 0.99, "the model hides a point when more light than this is absorbed in front of it"),
        ("chunk_size", int, 2_048, "pixels computed at a time; less needs less memory"),
    ],
    "logging": [
        ("i_print", int, 100, "steps between TensorBoard scalars"),
        ("i_img", int, 500, "steps between TensorBoard pictures; 0: none"),
        ("i_weight", int, 20_000, "steps between checkpoints (one is always written at the end and on Ctrl-C)"),
        ("save_every_minutes", float, 10.0, "a checkpoint is also written when the last one is older; 0: never"),
        ("keep", int, 3, "checkpoints that are kept, the newest ones; 0: all"),
        ("no_tensorboard", bool, False, "write no TensorBoard files"),
    ],
    "limits": [
        ("max_memory", float, 0.0, "GiB that training may take (on a GPU: of its memory); activations are computed "
         "again in pieces to keep to it; 0: no limit"),
        ("process_timeout", float, 10.0, "several processes: minutes without an answer after which one counts as lost"),
    ],
    "evaluation": [
        ("annotations", str, "", "annotations (.npz) to score against"),
        ("queries", str, "", "query points (.npz or .csv) to track, instead of annotations"),
        ("predictions", str, "", "tracks (.npz) of any tracker to score"),
        ("query_mode", ("first", "strided"), "strided", "TAP-Vid's query mode"),
        ("baselines", str, "", "comma-separated baselines in the table: static,chain"),
        ("out", str, "", "file to write, instead of the default in the run's folder"),
    ],
    "benchmark": [
        ("tapvid", str, "", "benchmark: a TAP-Vid pickle, a folder of its shards, or a folder of clips with "
         "annotations.npz; every video is preprocessed, trained, tracked and scored; --predictions is then a folder of "
         "NAME.npz"),
        ("videos", str, "", "comma-separated names: these videos only"),
        ("baseline", ("", "static", "chain"), "", "score this baseline instead of the model"),
        ("compare", str, "", "comma-separated folders of other results, shown beside in the plots and in results.md"),
        ("tapvid_size", int, 256, "side of the square frames that are tracked, TAP-Vid's is 256; 0: as in the file, "
         "which TAP-Vid counts as another category"),
        ("preprocessing", str, "--chain", "options of `python -m preprocessing` for every video"),
        ("sequences", str, "", "folder of the videos' sequence folders, shared by experiments; "
         "default SAVE_DIR/sequences/BENCHMARK"),
        ("shard", str, "", "I/N: only every N-th video, from the I-th on (0 to N-1), as for job arrays"),
        ("ray", "optional", "", "run one video a task on Ray: `--ray` starts it here, `--ray ADDRESS` joins a cluster"),
        ("num_cpus", float, 1, "Ray: CPUs that a task asks for"),
        ("num_gpus", float, -1, "Ray: GPUs that a task asks for; fractions share one; -1: 1 where there is CUDA"),
    ],
    "visualization": [
        ("what", str, "tracks,depth", "comma-separated: tracks, trails, occlusion, depth, flow, color, canonical, "
         "errors, pairs, all (these), page"),
        ("formats", str, "mp4", "comma-separated: mp4, gif, png (a folder of frames)"),
        ("out_dir", str, "", "folder of the results, instead of the run's"),
        ("query_frame_id", int, 0, "frame whose points are drawn"),
        ("target_frame_id", int, -1, "the other frame of `pairs`; -1: half the clip away"),
        ("grid_interval", int, 0, "pixels between the drawn points; 0: about 28 points along the longer side"),
        ("use_mask", bool, False, "draw points of the sequence's foreground mask only"),
        ("foreground_mask_path", str, "", "image whose bright (or opaque) pixels are the foreground"),
        ("fps", float, 10.0, "frames a second of the videos and of the page"),
        ("dense_interval", int, 0, "pixels between computed depths, colors and flow; 0: all on a GPU, else 96 along "
         "the longer side"),
        ("page_interval", int, 0, "page: pixels between its tracks; 0: 4 on a GPU, else 64 along the longer side"),
        ("page_query_stride", int, 5, "page: frames between those whose pixels have tracks"),
        ("page_mb", float, 25.0, "page: largest size of the file; tracks are rounded more, then fewer, to keep to it"),
    ],
}

AT_MOST = {"grid_levels": 8,  # sides of 257 vertices, 3 GiB for 250 frames and two layers, with Adam's moments
           "grid_layers": 4}
AT_LEAST = {  # smallest values that make sense
    **dict.fromkeys(("num_iters", "num_pairs", "num_pts", "start_interval", "error_map_cell", "chunk_size", "i_print",
                     "i_weight", "i_cache", "latent_dim", "coupling_width", "coupling_layers", "projection_layers",
                     "pe_freq", "affine_width", "field_width", "field_layers", "lrate_decay_steps",
                     "grid_levels"), 1),
    **dict.fromkeys(("num_imgs", "num_samples_ray", "affine_layers"), 2), "fps": 0.1, "page_query_stride": 1,
    "page_mb": 1, "dense_interval": 0, "page_interval": 0, "grid_layers": 0,
    **dict.fromkeys(("i_img", "grid_interval", "grad_clip", "deform_start", "freeze_step", "error_map_uniform",
                     "error_map_random", "lr_feature", "lr_deform", "lr_color", "lrate_warmup_steps",
                     "recompute_above", "tapvid_size", "num_cpus", "w_depth", "save_every_minutes", "keep",
                     "max_memory", "process_timeout"), 0),
    "max_pixels": 1,
}


class _Parser(configargparse.ArgumentParser):
    """Errors are one line and exit code 2."""

    def error(self, message: str) -> None:
        sys.stderr.write(f"{self.prog}: {message} (--help lists the options)\n")
        sys.exit(2)


def parser(driver: str) -> configargparse.ArgumentParser:
    """The option table as a parser; all three drivers read the same config files."""
    out = _Parser(prog=f"{driver}.py", allow_abbrev=False,
                  config_file_parser_class=configargparse.DefaultConfigFileParser,
                  formatter_class=configargparse.ArgumentDefaultsHelpFormatter)
    out.add_argument("--config", is_config_file=True, help="config file, a preset of configs/ or your own")
    for group, options in OPTIONS.items():
        section = out.add_argument_group(group)
        for name, kind, default, text in options:
            if kind is bool:
                section.add_argument(f"--{name}", action="store_true", help=text)
            elif kind == "optional":  # a flag that may have a value
                section.add_argument(f"--{name}", nargs="?", const="local", default=default, help=text)
            elif isinstance(kind, tuple):
                section.add_argument(f"--{name}", choices=kind, default=default, help=text)
            else:
                section.add_argument(f"--{name}", type=kind, default=default, help=text)
    out.add_argument("--version", action="version", version="OmniMotion Turbo 0.1", help=SUPPRESS)
    return out


def parse(driver: str, argv: list[str] | None = None) -> Namespace:
    """Options of `driver` ("train", "eval", "viz") from the command line and the config file that it names.
    `max_pixels` holds from here on."""
    reader = parser(driver)
    try:
        options = reader.parse_args(argv)
    except UnicodeDecodeError:
        reader.error("the --config file is not a text in UTF-8")
    limit_pixels(options.max_pixels)
    for name, low in AT_LEAST.items():
        if not getattr(options, name) >= low:
            reader.error(f"--{name} {getattr(options, name)}: must be at least {low}")
    for name in ("init_layers", "follow_flow"):
        if getattr(options, name) not in (0, 1):
            reader.error(f"--{name} {getattr(options, name)}: must be 0 or 1")
    if options.min_depth >= options.max_depth:
        reader.error(f"--max_depth {options.max_depth}: must be more than --min_depth {options.min_depth}")
    for name in AT_MOST:
        if getattr(options, name) > AT_MOST[name]:
            reader.error(f"--{name} {getattr(options, name)}: must be at most {AT_MOST[name]}")
    return options


def run_dir(options: Namespace) -> Path:
    """SAVE_DIR/EXPNAME_SEQUENCE."""
    if not options.data_dir:
        raise UserError("no sequence folder given: say --data_dir seqs/NAME")
    return Path(options.save_dir) / f"{options.expname}_{Path(options.data_dir).resolve().name}"


def run(main: Callable[[], None]) -> None:
    """Call a driver's main; what is the user's to mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:  # a full or read-only disk, a folder that is gone
        if error.errno is None:  # not the system's word
            raise
        sys.stderr.write(f"error: {os_error_line(error)}; what was saved before is as it was\n")
        sys.exit(2)

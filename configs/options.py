"""All options of train.py, eval.py and viz.py, each defined once.

A config file (`--config configs/default.txt`) holds `name = value` lines; the command line overrides it. Every driver
accepts all options, so that one config file serves all three. `--help` of a driver lists only those that it reads.
For options of inference and data that are given in neither place, eval.py and viz.py use the values of the run.
Schedules are given in steps of a reference run of 100,000 steps; a run of `num_iters` steps scales them all.
"""

import logging
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import configargparse

from common.cli import Flag, Parser, yes_or_no
from common.errors import UserError
from common.files import MAX_PIXELS

log = logging.getLogger(__name__)
ALL = ("train", "eval", "viz")
TRAIN = ("train",)
EVAL = ("eval",)
VIZ = ("viz",)
TRACK = ("eval", "viz")  # drivers that track with a trained model


@dataclass(frozen=True)
class Option:
    """One option. `type` is bool, int, float, str, or the tuple of the allowed strings.

    `drivers` read the option. `old_names`, `old_negations` (of a bool: names of its opposite) and `old_values` are
    accepted in place of the current ones; of a comma-separated value, each part may be an old one. `bare` is the
    value of an option that is given without one."""
    name: str
    type: type | tuple[str, ...]
    default: bool | int | float | str
    help: str
    drivers: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    old_names: tuple[str, ...] = ()
    old_negations: tuple[str, ...] = ()
    old_values: tuple[tuple[str, str], ...] = ()
    bare: str | None = None
    group: str = ""


def _group(group: str, drivers: tuple[str, ...], *options: Option) -> list[Option]:
    """The options of one group. `drivers` read those that name no drivers of their own."""
    return [replace(option, group=group, drivers=option.drivers or drivers) for option in options]


OPTIONS = (
    *_group(
        "run", ALL,
        Option("data_dir", str, "", "sequence folder: color/ and correspondences/, or OmniMotion's layout"),
        Option("expname", str, "default", "name of the experiment; results go to SAVE_DIR/EXPNAME_SEQUENCE"),
        Option("save_dir", str, "out", "folder of all results"),
        Option("num_iters", int, 100_000, "number of training steps; all schedules are scaled to it", TRAIN, minimum=1),
        Option("seed", int, 1234, "seed of all random numbers", ("train", "viz")),
        Option("ckpt_path", str, "", "train: checkpoint whose model a new run starts from; eval, viz: checkpoint to "
               "use instead of the newest one of the run"),
        Option("reload", bool, True, "continue from the newest checkpoint in the run's folder",
               TRAIN, old_negations=("no_reload",)),
        Option("device", ("auto", "cpu", "cuda"), "auto", "device to compute on; auto: CUDA if available"),
    ),
    *_group(
        "evaluation", EVAL,
        Option("annotations", str, "", "annotations (.npz) to score the tracks against"),
        Option("queries", str, "", "query points (.npz or .csv) to track, without a score; with --predictions: "
               "those of its tracks"),
        Option("predictions", str, "", "tracks (.npz, .npy or .pt) of any tracker to score; with --tapvid: folder of "
               "NAME.npz"),
        Option("visible_th", float, 0.5, "probability above which points of --predictions are visible", minimum=0,
               maximum=1),
        Option("query_mode", ("first", "strided"), "strided", "TAP-Vid's query mode"),
        Option("baselines", str, "", "comma-separated baselines to score beside the model: static (points that do "
               "not move), chain (flow from frame to frame), multiflow (flow over 1, 2, 4, ... frames; --preprocessing "
               "chooses the --flow)"),
        Option("out", str, "", "file to write, instead of the default in the run's folder"),
        Option("coordinates", ("source", "frames"), "source", "pixels and frame numbers of query points and exports "
               "without a frame size: those of the source video if the sequence folder names it (video.json), or those "
               "of the sequence's frames", TRACK),
    ),
    *_group(
        "benchmark (options of train.py in --config or on the command line are used for training)", EVAL,
        Option("tapvid", str, "", "TAP-Vid pickle, folder of its shards, or folder of clips with annotations.npz; "
               "every video is preprocessed, trained, tracked and scored"),
        Option("videos", str, "", "comma-separated names of the videos to use; default: all"),
        Option("score_model", bool, True, "train the model and score it; no: score only --baselines"),
        Option("compare", str, "", "comma-separated folders of other results to show in plots and results.md"),
        Option("tapvid_size", int, 256, "side of the square frames in pixels, 256 in TAP-Vid; 0: size of the frames "
               "in the file, which TAP-Vid reports as another category", minimum=0),
        Option("preprocessing", str, "", "options of `python -m preprocessing` for every video"),
        Option("sequences", str, "", "folder of the videos' sequence folders, shared by experiments; default: "
               "SAVE_DIR/sequences/BENCHMARK"),
        Option("shard", str, "", "I/N: every N-th video, from the I-th on (0 to N-1), for job arrays"),
        Option("ray", str, "", "run one video per task on Ray: `--ray` starts it here, `--ray ADDRESS` joins a cluster",
               bare="local"),
        Option("num_cpus", float, 1, "Ray: number of CPUs per task", minimum=0),
        Option("num_gpus", float, -1, "Ray: number of GPUs per task, may be a fraction; -1: 1 if CUDA is available"),
    ),
    *_group(
        "visualization", VIZ,
        Option("what", str, "tracks,depth", "comma-separated: tracks, trails, occlusion, depth, flow, color, "
               "canonical, errors, pairs, all (these), page", old_values=(("colour", "color"),)),
        Option("formats", str, "mp4", "comma-separated: mp4, gif, png (a folder of frames)"),
        Option("out_dir", str, "", "folder of the results; default: in the run's folder"),
        Option("query_frame_id", int, 0, "frame whose points are drawn"),
        Option("target_frame_id", int, -1, "`pairs`: the second frame; -1: half of the clip away from the first"),
        Option("grid_interval", int, 0, "pixels between the drawn points; 0: about 28 points along the longer side",
               minimum=0),
        Option("use_mask", bool, False, "draw only points of the sequence's foreground mask"),
        Option("foreground_mask_path", str, "", "mask of the query frame: labels above 0, bright, or opaque pixels are "
               "the foreground"),
        Option("mask_label", int, 0, "label of the foreground in masks with labels; 0: every label above 0",
               minimum=0),
        Option("fps", float, 10.0, "frames per second of videos and page", minimum=0.1),
        Option("dense_interval", int, 0, "pixels between computed depths, colors and flow; 0: every pixel on a GPU, "
               "96 values along the longer side on a CPU", minimum=0),
        Option("page_interval", int, 0, "`page`: pixels between tracks; 0: 4 on a GPU, 64 tracks along the longer side "
               "on a CPU", minimum=0),
        Option("page_query_stride", int, 5, "`page`: frames between query frames", minimum=1),
        Option("page_mb", float, 25.0, "`page`: largest file size in MB; tracks are rounded, then thinned, to fit",
               minimum=1),
    ),
    *_group(
        "inference", TRACK,
        Option("follow_flow", bool, False, "follow the sequence's correspondences where they are reliable, and the "
               "model elsewhere"),
        Option("use_max_loc", bool, True, "map the sample of the largest weight; no: composite all samples of the ray"),
        Option("occlusion_th", float, 0.99, "share in [0, 1]; a point is occluded if more of the light than this is "
               "absorbed in front of it"),
    ),
    *_group(
        "data", TRAIN,
        Option("num_imgs", int, 250, "number of frames to use, from the first on, at most", ALL, minimum=2),
        Option("num_pairs", int, 8, "frame pairs per step; must be a multiple of the number of processes",
               minimum=1),
        Option("num_pts", int, 256, "points per pair", minimum=1),
        Option("start_interval", int, 20, "curriculum: largest distance between the frames of a pair at the start",
               minimum=1),
        Option("neighbor_weight", float, 0.5, "sampling weight of each adjacent frame as the second frame of a pair",
               old_names=("neighbour_weight",)),
        Option("use_count_map", bool, True, "until the first error map, sample pixels with weight 1 / sqrt(number "
               "of valid correspondences + 1)"),
        Option("error_map", ("accumulated", "last", "off"), "accumulated", "hard mining: sum errors over the whole "
               "run, keep only the last evaluation (OmniMotion), or none"),
        Option("error_map_cell", int, 8, "side of a cell of the error map in pixels", minimum=1),
        Option("error_map_uniform", float, 0.1, "share of points in [0, 1] that are drawn uniformly and not by the "
               "error map", minimum=0),
        Option("error_map_random", float, 0.0, "share of points in [0, 1] that are replaced by random ones "
               "(OmniMotion: 0.5)", minimum=0),
        Option("i_cache", int, 20_000, "reference steps between full evaluations for the error map", minimum=1),
    ),
    *_group(
        "optimization", TRAIN,
        Option("optimizer", ("adam", "muon"), "adam", "Adam as in OmniMotion, or Muon for the weight matrices of the "
               "invertible network", old_names=("optimiser",)),
        Option("lr_feature", float, 1e-3, "learning rate of the time latent", minimum=0),
        Option("lr_deform", float, 1e-4, "learning rate of the invertible network", minimum=0),
        Option("lr_color", float, 3e-4, "learning rate of the canonical field", minimum=0),
        Option("lrate_decay_steps", float, 20_000, "reference steps between decays of the learning rates", minimum=1),
        Option("lrate_decay_factor", float, 0.5, "factor of each decay"),
        Option("lrate_warmup_steps", float, 0.0, "reference steps of linear warm-up", minimum=0),
        Option("grad_clip", float, 1_000.0, "gradients with a larger norm are scaled down to it; the default is far "
               "above the norms of a converging run; 0: no clipping", minimum=0),
        Option("freeze_step", float, 40_000, "reference step at which the time latents are frozen; 0: never",
               minimum=0),
        Option("deform_start", float, 0.0, "reference step until which only the canonical field is trained", minimum=0),
        Option("distortion_start", float, 40_000, "reference step at which the distortion loss begins; deform = warp "
               "has none"),
        Option("w_smoothness", float, 0.0, "weight of the scene-flow smoothness loss (OmniMotion: 20)"),
        Option("w_depth", float, 0.0, "weight of the depth prior loss (`python -m preprocessing --depth` writes the "
               "prior)", minimum=0),
        Option("init_layers", bool, False, "deform = warp, grid: initialize the deformation from segmented "
               "motion, background behind foreground; with field = images, grid, also the field"),
        Option("init_depth", bool, False, "before training, fit the canonical field to the depth prior of the middle "
               "frame"),
        Option("max_padding", float, 0.0, "distance in pixels; predictions farther outside the frame have no flow "
               "loss"),
        Option("mask_near", bool, False, "set alpha to 0 for the nearest fifth of the samples of each ray, during "
               "the first 4,000 reference steps"),
    ),
    *_group(
        "model", TRAIN,
        Option("num_samples_ray", int, 32, "samples per ray; deform = warp: always one a layer; eval, viz: only for "
               "OmniMotion checkpoints", ALL, minimum=2),
        Option("min_depth", float, 0.0, "nearest depth of a sample; eval, viz: only for OmniMotion checkpoints", ALL),
        Option("max_depth", float, 2.0, "farthest depth of a sample; eval, viz: only for OmniMotion checkpoints", ALL),
        Option("deform", ("mlp", "warp", "grid"), "mlp", "map between a frame and the canonical volume: coupling "
               "layers with MLPs; invertible grids for each motion layer (warp), which are much faster; or grids whose "
               "maps may fold, from earlier versions"),
        Option("grid_levels", int, 6, "deform = warp, grid: number of grid levels, with sides of 3, 5, 9, ... vertices",
               minimum=1, maximum=8),  # 8: sides of 257 vertices, 3 GiB for 250 frames, two layers, Adam's moments
        Option("grid_layers", int, 0, "deform = warp, grid: number of motion layers; 0: 2, or up to 4 if --init_layers "
               "finds more", minimum=0, maximum=4),
        Option("field", ("gabor", "images", "grid"), "gabor", "canonical field: a Gabor network, an image "
               "for each motion layer (with deform = warp), or a volume of grids"),
        Option("field_width", int, 256, "width of the canonical field", minimum=1),
        Option("field_layers", int, 3, "hidden layers of the canonical field", minimum=1),
        Option("field_encoding", ("periodic", "nerf", "none"), "periodic", "encoding of canonical points: periodic "
               "(66 values), nerf (63: coordinates and 10 octaves), or none"),
        Option("time_latent", ("hash", "gabor", "table"), "hash", "time latents: hash grid with an MLP, Gabor "
               "network (OmniMotion), or one free vector per frame (table)"),
        Option("latent_dim", int, 128, "number of values of a time latent", minimum=1),
        Option("coupling_width", int, 256, "width of the coupling layers' MLPs", minimum=1),
        Option("coupling_layers", int, 2, "hidden layers of a coupling layer's MLP", minimum=1),
        Option("projection_layers", int, 2, "layers of a coupling layer's projection (OmniMotion: 1)", minimum=1),
        Option("pe_freq", int, 4, "octaves of the coupling layers' encoding", minimum=1),
        Option("use_affine", bool, True, "affine map of x and y before the coupling layers; grids always have one"),
        Option("affine_width", int, 256, "width of the affine map's MLP", minimum=1),
        Option("affine_layers", int, 8, "linear layers of the affine map's MLP", minimum=2),
    ),
    *_group(
        "logging", TRAIN,
        Option("i_print", int, 100, "steps between points of TensorBoard's curves", minimum=1),
        Option("i_img", int, 500, "steps between pictures in TensorBoard; 0: none", minimum=0),
        Option("i_weight", int, 20_000, "steps between checkpoints; one is also written before each diagnosis (in runs "
               "of 100 steps or more), at the end, and on Ctrl-C", minimum=1),
        Option("save_every_minutes", float, 10.0, "largest time between checkpoints in minutes; 0: no limit",
               minimum=0),
        Option("keep", int, 3, "number of checkpoints to keep; 0: all", minimum=0),
        Option("tensorboard", bool, True, "write TensorBoard files", old_negations=("no_tensorboard",)),
    ),
    *_group(
        "speed and memory", TRAIN,
        Option("precision", ("auto", "fp32", "tf32", "bf16"), "auto", "precision of the networks' matrix products; "
               "auto: bf16 if the hardware multiplies it, else fp32. Coordinates, depths and losses are always fp32",
               ALL),
        Option("mlp_backend", ("auto", "torch", "native", "triton", "tcnn"), "auto", "kernels of the networks: "
               "PyTorch, C++ (CPUs with AMX), Triton or tiny-cuda-nn (CUDA); auto: native if possible, else PyTorch",
               ALL),
        Option("chunk_size", int, 2_048, "pixels, of 32 samples each, per forward pass outside training steps; fewer "
               "need less memory", ALL, minimum=1),
        Option("max_pixels", int, MAX_PIXELS, "refuse images and video frames with more pixels", ALL, minimum=1),
        Option("compile", ("", "inductor"), "", "compile the forward pass and the losses with torch.compile; inductor "
               "uses CUDA graphs on a GPU; not with --deform warp", old_values=(("aot_eager", ""),)),
        Option("resident", ("auto", "yes", "no"), "auto", "keep frames and correspondences in GPU memory; auto: if "
               "they take at most half of what is free", old_values=(("true", "yes"), ("True", "yes"), ("1", "yes"),
                                                               ("false", "no"), ("False", "no"), ("0", "no"))),
        Option("max_memory", float, 0.0, "memory limit of training in GiB (GPU memory on CUDA); activations are "
               "recomputed in pieces to stay below it; 0: no limit", minimum=0),
        Option("recompute_above", int, 32_768, "CPU: number of samples per step (pairs x points x samples per ray) "
               "above which activations are recomputed in the backward pass", minimum=0),
        Option("process_timeout", float, 10.0, "several processes: minutes after which a process that does not "
               "answer counts as lost", minimum=0),
    ),
)


def parser(driver: str) -> Parser:
    """The parser of `driver`. It accepts all options; its help lists those that the driver reads."""
    out = Parser(prog=f"{driver}.py", usage=f"{driver}.py [--config FILE] --data_dir FOLDER [options]",
                 allow_abbrev=False, config_file_parser_class=configargparse.DefaultConfigFileParser)
    out.add_argument("--config", is_config_file=True, help="config file, a preset of configs/ or your own")
    groups = {}
    for option in OPTIONS:
        if option.group not in groups:
            groups[option.group] = out.add_argument_group(option.group)
        shown = option.help if driver in option.drivers else SUPPRESS
        _add(groups[option.group], option, shown)
    out.add_argument("--version", action="version", version="OmniMotion Turbo 0.1", help=SUPPRESS)
    out.add_argument("--baseline", help=SUPPRESS)  # removed; `parse` names its replacement
    return out


def _add(group, option: Option, shown: str) -> None:
    """Add one option to an argparse group with the help text `shown`."""
    if option.type is bool:
        group.add_argument(f"--{option.name}", action=Flag, default=option.default, help=shown,
                           old_names=option.old_names, old_negations=option.old_negations)
        return
    settings = {"dest": option.name, "default": option.default, "help": shown, "type": _reader(option)}
    if isinstance(option.type, tuple):
        settings["choices"] = option.type
    if option.bare is not None:
        settings |= {"nargs": "?", "const": option.bare}
    group.add_argument(f"--{option.name}", *(f"--{name}" for name in option.old_names), **settings)


def _reader(option: Option) -> Callable:
    """The function that turns an argument's text into the option's value."""
    if option.type in (int, float):
        return option.type
    current = dict(option.old_values)
    return lambda text: ",".join(current.get(part, part) for part in text.split(","))


def parse(driver: str, argv: list[str] | None = None,
          stored: Callable[[Namespace], dict[str, str]] | None = None) -> Namespace:
    """Options of `driver` ("train", "eval", "viz") from the command line and the config file that it names.

    stored: gives, for the options so far, the texts of the options of the run that they name; those in `taken_from_run`
    replace the defaults. A message lists those that differ. SystemExit 2 for a mistake, after one line on stderr."""
    reader = parser(driver)
    options = _parse(reader, argv)
    if stored is not None:
        texts = stored(options)
        taken = [option for option in taken_from_run(driver) if option.name in texts]
        reader.set_defaults(**{option.name: _value(option, texts[option.name]) for option in taken})
        before, options = vars(options), _parse(reader, argv)
        changed = [option for option in taken if before[option.name] != getattr(options, option.name)]
        if said := [f"{o.name} = {getattr(options, o.name)}" for o in changed if o.group != "model"]:
            log.info("options of the run: %s", ", ".join(said))
    if options.baseline:
        reader.error(f"--baseline was removed: say --no-score_model --baselines {options.baseline}")
    del options.baseline
    for option in OPTIONS:
        value = getattr(options, option.name)
        if limit := _limit(option, value):
            reader.error(f"--{option.name} {value}: must be {limit}")
    if options.min_depth >= options.max_depth:
        reader.error(f"--max_depth {options.max_depth}: must be more than --min_depth {options.min_depth}")
    return options


def taken_from_run(driver: str) -> list[Option]:
    """The options of inference and data that `driver` reads and whose default is the value that the run has."""
    return [option for option in OPTIONS if driver in option.drivers and driver in TRACK
            and (option.group in ("inference", "data", "model") or option.name == "max_pixels")]


def _parse(reader: Parser, argv: list[str] | None) -> Namespace:
    try:
        return reader.parse_args(argv)
    except UnicodeDecodeError:
        reader.error("the --config file is not a text in UTF-8")


def _limit(option: Option, value: bool | int | float | str) -> str:
    """The limit that the value is beyond, as words; empty if there is none."""
    if option.minimum is not None and not value >= option.minimum:  # also true for NaN
        return f"at least {option.minimum}"
    if option.maximum is not None and value > option.maximum:
        return f"at most {option.maximum}"
    return ""


def _value(option: Option, text: str) -> bool | int | float:
    """The value of a stored option. UserError if the text is none."""
    try:
        value = yes_or_no(text) if option.type is bool else option.type(text)
        if limit := _limit(option, value):
            raise ValueError(f"must be {limit}")
        return value
    except ValueError as error:
        raise UserError(f"the run's args.txt (or checkpoint) has {option.name} = {text[:40]!r}, which is no value of "
                        "this option: restore it, or remove args.txt") from error


def run_dir(options: Namespace) -> Path:
    """SAVE_DIR/EXPNAME_SEQUENCE."""
    if not options.data_dir:
        raise UserError("no sequence folder given: say --data_dir seqs/NAME")
    return Path(options.save_dir) / f"{options.expname}_{Path(options.data_dir).resolve().name}"

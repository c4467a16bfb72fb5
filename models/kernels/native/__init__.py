"""C++ kernels for CPUs: compiled on first use, cached in the user's cache.

Those of the networks (`kernels`) need a bfloat16 matrix unit (Intel AMX), those of displacement grids (`warp_kernels`)
run on any CPU."""

import hashlib
import logging
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp"]  # with errno, square roots are not vectorized
MATRIX_FLAGS = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]
MAX_OUTPUTS = 8      # largest number of outputs of the last layer
WIDTH_MULTIPLE = 32  # hidden widths must be multiples of this number of units


@cache
def matrix_unit() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)


@cache
def kernels():
    """Namespace of the compiled operators of the networks. None without a matrix unit, or if compilation fails (a
    warning is logged)."""
    if not matrix_unit() or not _load("omnimotion_turbo_native", ["chain.cpp", "gabor.cpp"], FLAGS + MATRIX_FLAGS,
                                      "steps of networks take longer"):
        return None
    return torch.ops.omnimotion_turbo


@cache
def warp_kernels():
    """Namespace of the compiled operators of models/kernels/warp.py and images.py; None, with a warning, if they cannot
    be built."""
    cost = "a step of configs/fast.txt takes about 3 times as long"
    sources = ["warp.cpp", "transfer.cpp", "bounded_sum.cpp", "images.cpp"]
    return torch.ops.omnimotion_turbo_warp if _load("omnimotion_turbo_warp", sources, FLAGS, cost) else None


def _load(name: str, sources: list[str], flags: list[str], cost: str) -> bool:
    """Load a library, after compiling it if necessary. False, with a warning, if that fails. cost: what PyTorch's
    version costs, for the warning."""
    try:
        torch.ops.load_library(_library(name, sources, flags))
    except (OSError, RuntimeError, ImportError) as error:  # no compiler, no ninja, no writable cache
        log.warning("C++ kernels cannot be built (%s): PyTorch is used, %s. They need g++ and ninja",
                    (str(error) or type(error).__name__).splitlines()[0], cost)
        return False
    return True


def fits(layers: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernels support a chain: hidden widths that are multiples of WIDTH_MULTIPLE, at most
    MAX_OUTPUTS outputs, float32."""
    hidden = [weight.shape[0] for weight, _ in layers[:-1]]
    return all(width % WIDTH_MULTIPLE == 0 for width in hidden) and len(layers[-1][0]) <= MAX_OUTPUTS and (
        layers[0][0].dtype == torch.float32)


def _library(name: str, sources: list[str], flags: list[str]) -> Path:
    """Path of the shared library. Compiles it if the cache has none for these sources, flags and PyTorch, and for the
    instruction sets of this CPU (-march=native): a cache may be shared by several machines."""
    paths = [FOLDER / source for source in sources]
    text = b"".join(path.read_bytes() for path in [*paths, *sorted(FOLDER.glob("*.h"))])
    capabilities = torch.cpu.get_capabilities()
    cpu = [str(capabilities.get("cpu_name", "")), *sorted(name for name, has in capabilities.items() if has is True)]
    key = hashlib.sha256(text + " ".join([torch.__version__, *cpu, *flags]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "omnimotion-turbo"
    library = folder / f"{name}-{key}.so"
    if not library.is_file():
        from torch.utils.cpp_extension import load

        log.info("compiling C++ kernels into %s (half a minute, once)", folder)
        folder.mkdir(parents=True, exist_ok=True)
        build = Path(tempfile.mkdtemp(dir=folder))  # separate folder: safe with parallel or killed builds
        try:
            load(name, [str(path) for path in paths], extra_cflags=flags, build_directory=str(build),
                 is_python_module=False)
            (build / f"{name}.so").replace(library)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return library

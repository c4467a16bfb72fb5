"""Kernels in C++ for CPUs with a bfloat16 matrix unit (Intel AMX): compiled on first use, kept in the user's cache."""

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
NAME = "omnimotion_turbo_native"
FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-fopenmp", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]
MAX_OUT = 8  # outputs of a last layer
WIDTH = 32   # hidden widths are multiples of it


@cache
def matrix_unit() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)


@cache
def kernels():
    """The namespace of compiled operators, or None where there is no matrix unit or no compiler (which is logged)."""
    if not matrix_unit():
        return None
    try:
        torch.ops.load_library(_library())
    except (OSError, RuntimeError, ImportError) as error:  # no compiler, no ninja, no writable cache
        log.warning("the C++ kernels cannot be built (%s): going on with PyTorch's, which are slower. They need g++ "
                    "and ninja", str(error).splitlines()[0])
        return None
    return torch.ops.omnimotion_turbo


def fits(layers: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernels can take a chain: hidden widths are multiples of 32, at most 8 outputs."""
    hidden = [weight.shape[0] for weight, _ in layers[:-1]]
    return all(width % WIDTH == 0 for width in hidden) and len(layers[-1][0]) <= MAX_OUT and (
        layers[0][0].dtype == torch.float32)


def _library() -> Path:
    """The shared library, compiled if this machine's cache has none of these sources and this PyTorch."""
    sources = sorted(FOLDER.glob("*.cpp"))
    text = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*")))
    key = hashlib.sha256(text + " ".join([torch.__version__, _cpu(), *FLAGS]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "omnimotion-turbo"
    library = folder / f"{NAME}-{key}.so"
    if not library.is_file():
        from torch.utils.cpp_extension import load

        log.info("compiling the C++ kernels into %s (half a minute, once)", folder)
        folder.mkdir(parents=True, exist_ok=True)
        build = Path(tempfile.mkdtemp(dir=folder))  # its own folder: a killed or a second build disturbs nobody
        try:
            load(NAME, [str(path) for path in sources], extra_cflags=FLAGS, build_directory=str(build),
                 is_python_module=False)
            (build / f"{NAME}.so").replace(library)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return library


def _cpu() -> str:
    """Name of the CPU: the compiler makes code for it."""
    return str(torch.cpu.get_capabilities().get("cpu_name", ""))

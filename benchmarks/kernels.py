"""Registers and shared memory of the Triton kernels, without a GPU: python -m benchmarks.kernels

Compiles the kernels of the coupling stack for compute capabilities 8.0 (A100) and 9.0 (H100) at width 256 with the
tiles of models/kernels/triton_coupling.py. Prints what the assembler reports: registers per thread, spilled bytes per
thread and shared memory per block. The limit of a block is 163 KiB on an A100 and 227 KiB on an H100.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

from common.cli import Parser
from evaluation.tables import markdown
from models.kernels import triton_coupling as coupling

SHARED_LIMIT = {80: 163, 90: 227}  # KiB per block, by 10 x compute capability


@dataclass
class Usage:
    """Resources that one kernel uses."""
    registers: int  # per thread
    spilled: int    # bytes per thread
    shared: float   # KiB per block


def compile_kernel(kernel, constants: dict, tiles: coupling.Tiles, precision: str, arch: int) -> Usage:
    """Compile a kernel of models/kernels/triton_kernels.py for compute capability `arch` / 10; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    operand = "*bf16" if precision == "bf16" else "*fp32"
    special = {"hidden": operand, "h": operand, "g": operand, "coordinates": "i32", "first_slope": "fp32",
               **dict.fromkeys(("M", "L", "B", "N", "stride"), "i32"), **dict.fromkeys(constants, "constexpr")}
    signature = {name: special.get(name, "*fp32") for name in kernel.arg_names}
    if kernel.arg_names[0] == "g":
        signature["out"] = "*fp32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", arch, 32),
                              tiles.launch())
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        report = subprocess.run([get_ptxas(arch).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"],
                                capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spilled = max(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    return Usage(registers, spilled, compiled.metadata.shared / 1024)


def usages(precision: str, arch: int, width: int = 256, depth: int = 2, octaves: int = 4) -> dict[str, Usage]:
    """Resources of the three kernels, by name."""
    from models.kernels import triton_kernels as kernels

    stack = coupling.Stack((0, 1, 2), octaves, 0.0, False, precision)
    forward, gradient = coupling.FORWARD[precision], coupling.GRADIENT[precision]
    backward = coupling.backward_tiles(precision, depth, (arch // 10, arch % 10))
    product = {"D": depth, "W": width, "BW": min(gradient.columns, width), "BK": gradient.points,
               "PRODUCT": coupling.product(precision)}
    jobs = {"stack": (kernels.stack_kernel, {"INVERSE": False, **stack.constants(width, depth, forward)}, forward),
            "layer backward": (kernels.layer_backward_kernel, {
                "COORDINATE": 0, "INVERSE": False, **stack.constants(width, depth, backward)}, backward),
            "weight gradient": (kernels.weight_gradient_kernel, product, gradient)}
    return {name: compile_kernel(kernel, constants, tiles, precision, arch)
            for name, (kernel, constants, tiles) in jobs.items()}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities, times ten")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--depth", type=int, default=2, help="hidden layers of a coupling's MLP")
    args = parser.parse_args()
    rows = [[str(arch / 10), precision, name, str(use.registers), str(use.spilled), f"{use.shared:.0f}"]
            for arch in args.arch for precision in args.precision
            for name, use in usages(precision, arch, depth=args.depth).items()]
    print(markdown(["compute capability", "precision", "kernel", "registers", "spilled, bytes", "shared, KiB"], rows))


if __name__ == "__main__":
    main()

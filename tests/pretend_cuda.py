"""Find device errors without a GPU: tensors are marked as being on CUDA, while all computation is on the CPU.

Within `pretend_cuda()`, every PyTorch call from Python is checked. A tensor is on the device on which it was created or
to which it was moved; results are on the device of their inputs. A call that mixes devices raises DeviceError where
PyTorch would raise an error on a GPU. `.numpy()` of a tensor marked as on CUDA also raises DeviceError.

Not checked: calls inside PyTorch's own functions, kernels that autograd runs, and kernels of this project that need
CUDA or Triton. The functions of torch.cuda that the project uses are replaced.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ACROSS = {"copy_", "_has_compatible_shallow_copy_type"}  # calls that may mix devices
GETTERS = {"shape", "dtype", "requires_grad", "is_leaf", "ndim", "layout", "grad_fn", "__len__", "size", "dim", "numel"}
MAKERS = {"zeros", "ones", "full", "empty", "rand", "randn", "randint", "randperm", "arange", "linspace", "logspace",
          "eye", "tensor", "as_tensor", "scalar_tensor", "empty_strided", "tril_indices", "triu_indices"}


class DeviceError(RuntimeError):
    """A call that would fail on a GPU: it mixes devices, or needs a tensor in CPU memory that is marked as on CUDA."""


class PretendGenerator(torch.Generator):
    """A CPU generator that reports the device with which it was constructed."""

    def __new__(cls, device: object = "cpu") -> "PretendGenerator":
        generator = super().__new__(cls, "cpu")
        generator.claimed = CUDA if torch.device(device).type == "cuda" else CPU
        return generator

    @property
    def device(self) -> torch.device:
        return self.claimed


def claim(tensor: torch.Tensor) -> torch.Tensor:
    """Mark the tensor's storage, and so all views of it, as on CUDA; returns the tensor."""
    with torch._C.DisableTorchFunction():
        tensor.untyped_storage().on_cuda = True
    return tensor


def claims(tensor: torch.Tensor) -> bool:
    """Whether the tensor is marked as on CUDA."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "on_cuda", False)


class PretendCuda(TorchFunctionMode):
    """Check the devices of every call, then run it on the CPU. Use `pretend_cuda()`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        if name == "__set__":
            return self._set_property(func, args)
        if name in GETTERS:
            return func(*args, **kwargs)
        leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        cuda = [x for x in leaves if claims(x)]
        if name in ("to", "cpu", "cuda") and leaves and args and args[0] is leaves[0]:
            return self._moved(func, name, args, kwargs)
        if name in ("numpy", "__array__") and cuda:
            raise DeviceError("can't convert a tensor on CUDA to numpy: use .cpu() first")
        if name == "pin_memory":
            if cuda:
                raise DeviceError("cannot pin a tensor on CUDA")
            return args[0]
        device = kwargs.pop("device", None)
        target = device if device is None else torch.device(device)
        if device is not None and target.type != "cuda":
            kwargs["device"] = device
        if name in MAKERS or name.startswith("new_") or name.endswith("_like"):
            on_cuda = target.type == "cuda" if target is not None else bool(cuda) and name not in ("tensor", "arange")
            self._check_generator(name, kwargs, on_cuda)
            out = func(*args, **kwargs)
            if on_cuda and name in ("as_tensor", "tensor") and not cuda:
                out = out.clone()
            return claim(out) if on_cuda else out
        if torch._C._current_graph_task_id() == -1:  # gradients made by autograd are not marked
            self._check(func, name, args, leaves, cuda)
            self._check_generator(name, kwargs, bool(cuda), bool(leaves))
        out = func(*args, **kwargs)
        if cuda and name not in ("tolist", "item", "copy_"):
            tree_map(lambda x: claim(x) if isinstance(x, torch.Tensor) and not claims(x) else x, out)
        return out

    @staticmethod
    def _property(func, args):
        tensor = args[0]
        owner = getattr(func.__self__, "__name__", "")
        if owner == "device":
            return CUDA if claims(tensor) else CPU
        if owner in ("is_cuda", "is_cpu"):
            return claims(tensor) == (owner == "is_cuda")
        out = func(*args)
        if isinstance(out, torch.Tensor) and claims(tensor):
            claim(out)  # .grad, .T, .data
        return out

    @staticmethod
    def _set_property(func, args):
        if func.__self__.__name__ == "grad" and args[1] is not None and claims(args[0]) != claims(args[1]):
            raise DeviceError("a gradient on another device than its tensor")
        return func(*args)

    @staticmethod
    def _moved(func, name, args, kwargs):
        tensor, rest = args[0], list(args[1:])
        target = {"cpu": CPU, "cuda": CUDA}.get(name)
        if name == "to":
            for value in [*rest, *kwargs.values()]:
                if isinstance(value, str | torch.device | int) and not isinstance(value, bool):
                    target = torch.device(value)
                elif isinstance(value, torch.Tensor):
                    target = CUDA if claims(value) else CPU
            rest = [CPU if isinstance(value, str | torch.device | int) and not isinstance(value, bool) else value
                    for value in rest]
            if "device" in kwargs:
                kwargs["device"] = CPU
        else:
            func, rest, kwargs = torch.Tensor.to, [CPU], {}
        on_cuda = claims(tensor) if target is None else target.type == "cuda"
        out = func(tensor, *rest, **kwargs)
        if on_cuda != claims(tensor) and out.untyped_storage() is tensor.untyped_storage():
            out = out.clone()
        return claim(out) if on_cuda else out

    @staticmethod
    def _check(func, name, args, leaves, cuda):
        other = [x for x in leaves if x.ndim > 0 and not claims(x)]
        if name == "__getitem__" and cuda and claims(args[0]):
            return  # indices may be on the CPU
        if name == "__setitem__" and claims(args[0]) and not any(
                isinstance(x, torch.Tensor) for x in tree_flatten(args[1])[0]):
            return  # a copy into a slice
        if cuda and other and name not in ACROSS and (any(x.ndim > 0 for x in cuda) or name.startswith("__setitem__")):
            shapes = ", ".join(f"{tuple(x.shape)} on {'cuda' if claims(x) else 'cpu'}" for x in leaves)
            raise DeviceError(f"{name}: tensors of two devices: {shapes}")
        if name == "__getitem__" and not claims(args[0]) and cuda:
            raise DeviceError("indices on CUDA of a tensor on the CPU")

    @staticmethod
    def _check_generator(name, kwargs, on_cuda, has_tensors=True):
        generator = kwargs.get("generator")
        if generator is not None and has_tensors and (generator.device.type == "cuda") != on_cuda:
            raise DeviceError(f"{name}: a generator on {generator.device.type} for a tensor on the other device")


@contextmanager
def pretend_cuda():
    """Within this context, torch.cuda is available, and tensors moved to "cuda" are marked as on CUDA."""
    replaced = {"is_available": lambda: True, "device_count": lambda: 1, "synchronize": lambda *a: None,
                "mem_get_info": lambda *a: (1 << 40, 1 << 40), "memory_allocated": lambda *a: 0,
                "max_memory_allocated": lambda *a: 0, "reset_peak_memory_stats": lambda *a: None,
                "get_device_name": lambda *a: "pretended", "is_bf16_supported": lambda *a: False,
                "get_device_capability": lambda *a: (8, 0), "get_rng_state": lambda *a: torch.get_rng_state(),
                "set_rng_state": lambda *a: None}
    with mock.patch.multiple(torch.cuda, **replaced), mock.patch.object(torch, "Generator", PretendGenerator):
        with PretendCuda():
            yield

"""Safe reading of untrusted pickles: only numbers, strings, bytes, lists, tuples, dicts and numpy arrays are allowed.

A pickle is a program, so this module allows only listed opcodes, which build plain containers, and the few global names
that numpy writes into pickles. Each name maps to a replacement function in this file. With numpy's own functions, a
pickle could build a dtype of Python objects that is not marked as one, and use it to read and write arbitrary memory.
"""

import math
import pickle
import re
from pathlib import Path

import numpy as np

from common.errors import UserError

# Allowed opcodes. Those that create class instances are excluded, and so are sets: hashing deeply nested members fails.
INSTRUCTIONS = (
    "MARK STOP POP POP_MARK DUP FLOAT INT BININT BININT1 BININT2 LONG LONG1 LONG4 NONE NEWTRUE NEWFALSE BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8 READONLY_BUFFER LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS TUPLE "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE PROTO FRAME GLOBAL "
    "STACK_GLOBAL REDUCE BUILD").split()


class PlainDtype:
    """Replacement for numpy.dtype: numbers, strings, bytes, or object (for arrays of bytes only)."""

    def __init__(self, code: str, *flags: object):
        if not (isinstance(code, str) and re.fullmatch(r"[biufSUO][1-9]\d{0,8}", code)):
            raise pickle.UnpicklingError("it has a dtype that is not of numbers or bytes")
        self.value = np.dtype(code)

    def build(self, state: tuple) -> None:
        """Set the byte order from the state in the pickle. UnpicklingError for structured dtypes."""
        order, *structure = state[1:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in structure):
            raise pickle.UnpicklingError("it has a dtype that is not of numbers or bytes")
        if order != "|":
            self.value = self.value.newbyteorder(order)


def _array(*subtype_shape_kind: object) -> np.ndarray:
    """Replacement for numpy's _reconstruct: an empty array, which BUILD fills."""
    return np.empty(0, np.int8)


def _fill(array: np.ndarray, state: tuple) -> None:
    """Set shape, dtype and data of an array from the state in the pickle. UnpicklingError if they do not match."""
    shape, dtype, fortran, data = state[-4:]
    whole = isinstance(shape, tuple) and all(isinstance(side, int) and side >= 0 for side in shape)
    if not whole or not isinstance(dtype, PlainDtype):
        raise pickle.UnpicklingError("it has an array without a shape or dtype")
    objects, count = dtype.value.hasobject, math.prod(shape)
    if objects:
        fits = isinstance(data, list) and len(data) == count and all(isinstance(item, bytes) for item in data)
    else:
        fits = isinstance(data, bytes | bytearray) and len(data) == count * dtype.value.itemsize
    if not fits:
        raise pickle.UnpicklingError("it has an array whose shape does not fit its data, or that holds objects")
    array.__setstate__((1, shape, dtype.value, bool(fortran), data if objects else bytes(data)))


def _scalar(dtype: PlainDtype, data: bytes) -> np.generic:
    if dtype.value.hasobject:
        raise pickle.UnpicklingError("it has a scalar that is an object")
    return np.frombuffer(data, dtype.value, 1)[0]


def _array_of_buffer(data: bytes, dtype: PlainDtype, shape: tuple, order: str) -> np.ndarray:
    """Replacement for numpy's _frombuffer, which pickle protocol 5 uses."""
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _bytes(*parts: object) -> bytes:
    """Replacement for bytes and bytearray. Arguments: none, bytes, or a string and latin-1; not a length (10**12)."""
    if not parts:
        return b""
    if isinstance(parts[0], str) and len(parts) == 2:
        return _latin1(*parts)
    if isinstance(parts[0], bytes | bytearray) and len(parts) == 1:
        return bytes(parts[0])
    raise pickle.UnpicklingError("it makes bytes of something else")


def _latin1(text: str, encoding: str) -> bytes:
    """Replacement for _codecs.encode, which Python 3 uses to write bytes in protocols 0 to 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {str(encoding)[:40]}")
    return text.encode("latin1")


NUMPY = {"_reconstruct": _array, "scalar": _scalar, "_frombuffer": _array_of_buffer}  # in numpy.core or numpy._core
NAMES = {("numpy", "ndarray"): "ndarray",  # only an argument of _reconstruct; cannot be called
         ("numpy", "dtype"): PlainDtype, ("_codecs", "encode"): _latin1,
         **{(module, name): _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")}}


class _Instructions(dict):
    """Handler of each allowed opcode; any other opcode raises UnpicklingError."""

    def __missing__(self, code: int):
        raise pickle.UnpicklingError(f"it has the instruction {chr(code)!r}")


class PlainUnpickler(pickle._Unpickler):
    """Python's pure Python unpickler, restricted to the allowed opcodes.

    The C unpickler is faster, but it allocates its memo for any index that a file uses, up to 64 GB."""

    dispatch = _Instructions({code: pickle._Unpickler.dispatch[code]
                              for code in (getattr(pickle, name)[0] for name in INSTRUCTIONS)})

    def find_class(self, module: str, name: str):
        """The replacement for a global name. UnpicklingError if the name is not allowed."""
        if (module, name) in NAMES:
            return NAMES[module, name]
        if module.rpartition(".")[0] in ("numpy.core", "numpy._core") and name in NUMPY:
            return NUMPY[name]
        raise pickle.UnpicklingError(f"it asks for {module[:40]}.{name[:40]}")

    def load_setitems(self) -> None:
        """Set items of a dict. Keys are strings, bytes or ints: hashing deeply nested tuples would crash Python."""
        items = self.pop_mark()
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(target, key, value)

    def load_setitem(self) -> None:
        """Set one item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], key, value)

    def load_build(self) -> None:
        """Set the state of an array or a dtype. UnpicklingError for any other object."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is np.ndarray and target.shape == (0,):
            _fill(target, state)
        elif type(target) is PlainDtype:
            target.build(state)
        else:
            raise pickle.UnpicklingError("it changes an object")

    def load_dict(self) -> None:
        """Build a dict from the items above the mark on the stack."""
        items, out = self.pop_mark(), {}
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(out, key, value)
        self.append(out)

    dispatch.update({pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem, pickle.DICT[0]: load_dict,
                     pickle.BUILD[0]: load_build})

    @staticmethod
    def _set(target: object, key: object, value: object) -> None:
        if type(target) is not dict or not isinstance(key, str | bytes | int):
            raise pickle.UnpicklingError("it has a dict whose keys are not texts or numbers")
        target[key] = value


def read_pickle(path: Path) -> object:
    """Contents of a pickle of numpy arrays and plain containers.

    UserError if it is missing, is damaged, or would run code."""
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file).load()
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: download it from the TAP-Vid page, or give a folder of clips") from error
    except pickle.UnpicklingError as error:
        if str(error).startswith("it asks for "):
            raise UserError(f"{path} is refused: a TAP-Vid file holds arrays and plain containers only, and {error}; "
                            "do not trust this file") from error
        raise UserError(f"{path} cannot be read as a TAP-Vid pickle ({_line(error)}): download it again") from error
    except Exception as error:  # operations on the stack of a damaged pickle can raise any exception
        raise UserError(f"{path} is damaged or cut short ({_line(error)}): download it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__

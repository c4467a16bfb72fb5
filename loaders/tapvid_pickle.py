"""Pickles of strangers: numbers, texts, bytes, lists, tuples, dicts and numpy arrays, and nothing else.

A pickle is a program, so what it may do is listed here: instructions that build plain containers, and a handful of
names that numpy writes into pickles. Each name stands for a function of this file and not for numpy's own: with those,
a pickle can make a dtype of Python objects that says it is not one, and with it read and write any memory.
"""

import math
import pickle
import re
from pathlib import Path

import numpy as np

from common.errors import UserError

# Out are those that make objects of classes, and sets, whose members may be nested until hashing them fails.
INSTRUCTIONS = (
    "MARK STOP POP POP_MARK DUP FLOAT INT BININT BININT1 BININT2 LONG LONG1 LONG4 NONE NEWTRUE NEWFALSE BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8 READONLY_BUFFER LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS TUPLE "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE PROTO FRAME GLOBAL "
    "STACK_GLOBAL REDUCE BUILD").split()


class PlainDtype:
    """A dtype as a pickle describes it, of numbers, texts, bytes or (as a container of bytes) objects."""

    def __init__(self, code: str, *flags: object):
        if not (isinstance(code, str) and re.fullmatch(r"[biufSUO][1-9]\d{0,8}", code)):
            raise pickle.UnpicklingError("it has a dtype that is not of numbers or bytes")
        self.value = np.dtype(code)

    def build(self, state: tuple) -> None:
        """Take the byte order of a pickle's state of the dtype."""
        order, *structure = state[1:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in structure):
            raise pickle.UnpicklingError("it has a dtype that is not of numbers or bytes")
        if order != "|":
            self.value = self.value.newbyteorder(order)


def _array(*subtype_shape_kind: object) -> np.ndarray:
    """numpy's _reconstruct: an empty array that BUILD fills."""
    return np.empty(0, np.int8)


def _fill(array: np.ndarray, state: tuple) -> None:
    """Give an array the shape, dtype and data of a pickle, which must fit each other."""
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
    """numpy's _frombuffer, of protocol 5."""
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _bytes(*parts: object) -> bytes:
    """bytes(), bytes(b"..."), bytearray("...", "latin-1"): not bytes(10**12)."""
    if not parts:
        return b""
    if isinstance(parts[0], str) and len(parts) == 2:
        return _latin1(*parts)
    if isinstance(parts[0], bytes | bytearray) and len(parts) == 1:
        return bytes(parts[0])
    raise pickle.UnpicklingError("it makes bytes of something else")


def _latin1(text: str, encoding: str) -> bytes:
    """_codecs.encode: how Python 3 writes bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {str(encoding)[:40]}")
    return text.encode("latin1")


NUMPY = {"_reconstruct": _array, "scalar": _scalar, "_frombuffer": _array_of_buffer}  # in numpy.core or numpy._core
NAMES = {("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct; not to be called
         ("numpy", "dtype"): PlainDtype, ("_codecs", "encode"): _latin1,
         **{(module, name): _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")}}


class _Instructions(dict):
    """What the unpickler does at each instruction; another is an UnpicklingError."""

    def __missing__(self, code: int):
        raise pickle.UnpicklingError(f"it has the instruction {chr(code)!r}")


class PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler with fewer instructions. Not the faster one in C, which makes room for any number that a
    file gives to an object, 64 GB for the largest."""

    dispatch = _Instructions({code: pickle._Unpickler.dispatch[code]
                              for code in (getattr(pickle, name)[0] for name in INSTRUCTIONS)})

    def find_class(self, module: str, name: str):
        """What stands for the name. UnpicklingError for one that is not on the lists."""
        if (module, name) in NAMES:
            return NAMES[module, name]
        if module.rpartition(".")[0] in ("numpy.core", "numpy._core") and name in NUMPY:
            return NUMPY[name]
        raise pickle.UnpicklingError(f"it asks for {module[:40]}.{name[:40]}")

    def load_setitems(self) -> None:
        """Items of a dict. Keys are plain: hashing a tuple of tuples of ... would end the process."""
        items = self.pop_mark()
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(target, key, value)

    def load_setitem(self) -> None:
        """One item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], key, value)

    def load_build(self) -> None:
        """The state of an array or a dtype, and of nothing else."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is np.ndarray and target.shape == (0,):
            _fill(target, state)
        elif type(target) is PlainDtype:
            target.build(state)
        else:
            raise pickle.UnpicklingError("it changes an object")

    def load_dict(self) -> None:
        """A dict of the items since the mark."""
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
    except Exception as error:  # a damaged pickle does anything to the objects on its stack
        raise UserError(f"{path} is damaged or cut short ({_line(error)}): download it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__

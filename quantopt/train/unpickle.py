"""Reads the pickles of CIFAR-10 and CIFAR-100 without running code that a pickle names.

A pickle is a program that may import and call any function. Here it may name only what rebuilding a numpy
array of numbers needs, and each of those names stands for a class of this file, which checks its arguments
and builds the array itself. Everything else is refused.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


class _Ndarray:
    """Stands for the class numpy.ndarray, which a pickle needs only as an argument."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a class")


class _Dtype(_Ndarray):
    """numpy.dtype(code, align, copy), then its state (version, byte order, ...)."""

    def __init__(self, code: Any = "", align: Any = False, copy: Any = False) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in _DTYPES:
            # only text is shown: lists that hold one list twice, which does so too, have a text without bound
            shown = repr(code[:20]) if isinstance(code, str) else type(code).__name__
            raise pickle.UnpicklingError(f"arrays of type {shown} are refused")
        self.code: str = code
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|") or any(item is not None for item in state[2:5]):
            raise pickle.UnpicklingError("structured arrays are refused")
        self.order = "<" if order == "|" else order


class _Array(_Ndarray):
    """The array that numpy's `_reconstruct` starts and the state (version, shape, dtype, order, bytes) fills."""

    value: np.ndarray[Any, Any] | None = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


class _ArrayFromBuffer(_Array):
    """numpy's `_frombuffer(bytes, dtype, shape, order)`, what pickle protocol 5 writes."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        self.value = _array(data, dtype, shape, order)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("an array is filled twice")


class _Encode(bytes):
    """codecs.encode(text, "latin1"): how Python 3 writes bytes into a protocol 2 pickle."""

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("an encoding other than latin1 is refused")
        return text.encode("latin1")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array is not made of bytes")
    return np.frombuffer(bytes(data), dtype.order + dtype.code).reshape(shape, order=order)


_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _ArrayFromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _ArrayFromBuffer,
}


class _Call:
    """A name in a pickle: can be called and passed on, but not changed."""

    __slots__ = ("_target",)

    def __init__(self, target: type) -> None:
        self._target = target

    def __call__(self, *arguments: Any) -> Any:
        return self._target(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_CONSUMED = ("REDUCE", "BUILD")
_NO_STEP = ("PROTO", "FRAME")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_SHARED = (
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
    *("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", *_GETS),
)
"""Opcodes whose result may be used again: none leaves a tuple that holds something."""
_MAX_TUPLES = 100  # an array has two beside the arguments of calls


def _check_tuples(data: bytes) -> None:
    """Raises UnpicklingError for tuples that are used twice or too many.

    A tuple that is the key of a dictionary is hashed while the pickle is read, with all that it holds: nested deeply it
    overflows the stack of the process, and if each holds another twice it takes time without bound.
    """
    tuples, last = 0, ""
    memo: dict[int, bool] = {}  # whether what was stored may be used again
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _PUTS:
            memo[len(memo) if name == "MEMOIZE" else argument] = last in _SHARED
            continue
        if name in _NO_STEP:
            continue
        tuples += last in _TUPLES and name not in _CONSUMED
        if tuples > _MAX_TUPLES or name == "DUP" or (name in _GETS and not memo.get(argument, False)):
            raise pickle.UnpicklingError("it nests or repeats tuples, which is refused")
        last = name


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        target = _ALLOWED.get((module, name))
        if target is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return _Call(target)


def loads(data: bytes) -> dict[str, Any]:
    """The dictionary pickled in `data`, its keys as text, of numbers, text, bytes, lists, tuples and numpy arrays.

    Reads what Python 2 and 3 write. Raises pickle.UnpicklingError on anything else, whatever is wrong with it.
    """
    try:
        _check_tuples(data)
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a malformed pickle may raise nearly anything
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, not a dictionary")
    contents: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, bytes | str):
            raise pickle.UnpicklingError(f"it has a key that is a {type(key).__name__}, not text")
        text = key.decode("latin1") if isinstance(key, bytes) else key
        if text in contents:
            raise pickle.UnpicklingError(f"it has the key {text!r} twice")
        contents[text] = item.value if isinstance(item, _Array) else item
    return contents

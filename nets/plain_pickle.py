"""Pickles of plain data, read without running them.

A pickle is a program for a stack machine that may call any function. This is a machine of its own for the few
instructions that dictionaries, lists, text and NumPy arrays of whole numbers need; it calls nothing, and every other
instruction or name is an error.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_STRINGS = {"BINSTRING", "SHORT_BINSTRING"}  # of Python 2: bytes
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_DTYPES = ("u1", "i1", "i2", "i4", "i8")
_MARK = object()


class _Name(NamedTuple):
    """A name that a pickle mentions; it is never looked up."""

    module: str
    name: str


@dataclass
class _Array:
    """An array on the machine's stack, before and after its state is known."""

    values: np.ndarray | None = None


@dataclass
class _Dtype:
    """A dtype on the machine's stack."""

    name: str
    order: str = "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.name)


def read_plain_pickle(data: bytes) -> Any:
    """The value of a pickle (protocols 2 to 4) of dictionaries, lists, tuples, text, numbers and integer arrays.

    Args:
      data: the whole pickle; text of Python 2 becomes bytes.

    Returns:
      The value, arrays as `numpy.ndarray`.

    Raises:
      ValueError: no pickle, a truncated one, or one that needs more than that; says what.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__})") from error
    return _finished(machine.result, 0)


class _Machine:
    """Stack and memo of a pickle in progress."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        """Runs one instruction."""
        stack = self.stack
        if name in _NUMBERS | _TEXTS:
            stack.append(argument)
        elif name in _STRINGS:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PUTS or name == "MEMOIZE":
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            items = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            stack.append(tuple(items))
        elif name not in ("PROTO", "FRAME"):
            self._act(name, argument)

    def _act(self, name: str, argument: Any) -> None:
        actions: dict[str, Callable[[], None]] = {
            "MARK": lambda: self.stack.append(_MARK),
            "EMPTY_DICT": lambda: self.stack.append({}),
            "EMPTY_LIST": lambda: self.stack.append([]),
            "EMPTY_TUPLE": lambda: self.stack.append(()),
            "TUPLE": lambda: self.stack.append(tuple(self._marked())),
            "APPEND": lambda: self._append([self.stack.pop()]),
            "APPENDS": lambda: self._append(self._marked()),
            "SETITEM": lambda: self._set([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda: self._set(self._marked()),
            "GLOBAL": lambda: self._mention(*argument.split(" ")),
            "STACK_GLOBAL": lambda: self._mention(self.stack.pop(-2), self.stack.pop()),
            "REDUCE": self._reduce,
            "BUILD": self._build,
            "STOP": self._stop,
        }
        if name not in actions:
            raise ValueError(f"a pickle with the instruction {name}, which plain data do not need")
        actions[name]()

    def _marked(self) -> list[Any]:
        """Takes everything above the latest mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _append(self, items: list[Any]) -> None:
        self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, bytes | str):
                raise ValueError("a pickle with keys that are no text")
            self.stack[-1][key] = value

    def _mention(self, module: Any, name: Any) -> None:
        # Only text is hashed or shown: tuples nested in tuples would take forever.
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a pickle with names that are no text")
        if (module, name) not in _NAMES:
            raise ValueError(f"a pickle that would call {module[:40]}.{name[:40]}")
        self.stack.append(_Name(module, name))

    def _reduce(self) -> None:
        """What would be a call, by hand."""
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Name):
            raise ValueError("a pickle that would call what is no name")
        if called.name == "_reconstruct":
            self.stack.append(_Array())
        elif called.name == "dtype":
            name = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
            if not isinstance(name, str) or name not in _DTYPES:
                raise ValueError("a pickled array of anything but whole numbers")
            self.stack.append(_Dtype(name))
        elif called.name == "encode" and arguments[1] in ("latin1", "latin-1"):
            self.stack.append(arguments[0].encode("latin-1"))
        else:
            raise ValueError(f"a pickle that would call {called.module}.{called.name}")

    def _build(self) -> None:
        """Gives an array or a dtype its state."""
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, _Dtype):
            order = state[1].decode() if isinstance(state[1], bytes) else state[1]
            if order not in ("|", "<", ">"):
                raise ValueError("a pickled array of unknown byte order")
            built.order = order
            return
        if not isinstance(built, _Array):
            raise ValueError("a pickle of objects, not of plain data")
        _, shape, dtype, is_fortran, data = state
        if not all(isinstance(size, int) and size >= 0 for size in shape) or not isinstance(data, bytes):
            raise ValueError("a pickled array without shape or data")
        if math.prod(shape) * dtype.numpy().itemsize != len(data):
            raise ValueError(f"a pickled array of shape {shape} with {len(data)} bytes")
        built.values = np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if is_fortran else "C")

    def _stop(self) -> None:
        if len(self.stack) != 1:
            raise ValueError("a damaged pickle (more than one value)")
        self.result = self.stack.pop()


def _finished(value: Any, depth: int) -> Any:
    """Arrays in place of what stood for them, in the dictionaries at the top."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict) and depth < 2:
        return {key: _finished(item, depth + 1) for key, item in value.items()}
    return value

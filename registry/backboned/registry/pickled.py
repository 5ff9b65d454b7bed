"""A look at a pickle before torch follows it: whether it can hold anything but tensors and plain values.

`torch.load(weights_only=True)` runs no code, yet does as a pickle says: it allocates what `bytearray` asks for, hashes
tuples in tuples until the stack or a century ends, prints what has no end into an error. So the opcodes are followed
here first, on the sizes of values alone, and what a checkpoint doesn't need is refused. Nothing is built.
"""

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable

import torch

from backboned.registry.refusal import refused

MAX_PICKLE_BYTES = 16 * 2**20
MAX_OPCODES = 1_000_000
"""Of one pickle. A ResNet-152 with its optimizer takes 76 thousand, in 232 kB."""

MAX_TUPLE = 10_000
"""Values in a tuple, and in the tuples in it: Python hashes a tuple all through, on the C stack, and keeps no hash."""

_FUNCTIONS = {
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}
_STORAGES = ("torch", "torch.cuda", "torch.storage")

# What a value on the stack is. A tuple is told by the number of values in it and in its tuples, and two: positive where
# it holds nothing but scalars, negative else.
_FUNCTION, _SCALAR, _OBJECT = 0, 1, -1

_SCALARS = {b"J": 4, b"K": 1, b"M": 2, b"G": 8, b"N": 0, b"\x88": 0, b"\x89": 0}
"""Opcodes of numbers, None and booleans, with the bytes that follow."""
_COUNTED = {b"X": 4, b"U": 1, b"\x8a": 1}
"""Opcodes of text and long numbers, with the bytes that tell their length."""


def check_pickle(data: bytes, start: int = 0) -> int:
    """Check the pickle that begins at `start`; returns where it ends.

    Raises `BackbonedError` `DATA_LOSS` unless it makes only what a `state_dict` and what is saved beside it are made
    of, by opcodes that torch itself writes.
    """
    try:
        return _Machine(data, start).run()
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise refused("not a checkpoint that can be read: save model.state_dict() by torch.save") from error


class _Machine:
    """Follows opcodes as torch's unpickler does, with what values are in the place of the values."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._at = start
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}

    def run(self) -> int:
        steps: dict[bytes, Callable[[], object]] = {
            b"c": self._global,
            b"R": self._reduce,
            b"b": self._build,
            b"Q": self._persistent,
            b"(": lambda: self._marks.append(len(self._stack)),
            b"t": lambda: self._tuple(self._marks.pop()),
            b")": lambda: self._tuple(len(self._stack)),
            b"\x85": lambda: self._tuple(self._below(1)),
            b"\x86": lambda: self._tuple(self._below(2)),
            b"\x87": lambda: self._tuple(self._below(3)),
            b"]": lambda: self._stack.append(_OBJECT),
            b"}": lambda: self._stack.append(_OBJECT),
            b"\x8f": lambda: self._stack.append(_OBJECT),
            b"a": lambda: self._into_object(self._below(1)),
            b"e": lambda: self._into_object(self._marks.pop()),
            b"s": lambda: self._into_object(self._below(2)),
            b"u": lambda: self._into_object(self._marks.pop()),
            b"q": lambda: self._put(1),
            b"r": lambda: self._put(4),
            b"h": lambda: self._stack.append(self._memo[self._number(1)]),
            b"j": lambda: self._stack.append(self._memo[self._number(4)]),
            b"\x80": lambda: self._skip(1),
        }
        data = self._data
        for _ in range(MAX_OPCODES):
            opcode = data[self._at : self._at + 1]
            self._at += 1
            if (width := _SCALARS.get(opcode)) is not None:
                self._skip(width)
                self._stack.append(_SCALAR)
            elif (width := _COUNTED.get(opcode)) is not None:
                self._skip(self._number(width))
                self._stack.append(_SCALAR)
            elif opcode == b".":
                self._below(1)
                return self._at
            else:
                steps[opcode]()
        raise refused(f"it holds more than {MAX_OPCODES} values beside its tensors: save model.state_dict() alone")

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise IndexError("the pickle ends too soon")

    def _number(self, width: int) -> int:
        start = self._at
        self._skip(width)
        return int.from_bytes(self._data[start : self._at], "little")

    def _line(self) -> str:
        start = self._at
        self._at = self._data.index(b"\n", start) + 1
        return self._data[start : self._at - 1].decode("ascii")

    def _below(self, count: int) -> int:
        if len(self._stack) - count < (self._marks[-1] if self._marks else 0):
            raise IndexError("there is nothing on the stack")
        return len(self._stack) - count

    def _pop(self) -> int:
        self._below(1)
        return self._stack.pop()

    def _put(self, width: int) -> None:
        self._memo[self._number(width)] = self._stack[self._below(1)]

    def _into_object(self, start: int) -> None:
        del self._stack[start:]
        if self._stack[self._below(1)] != _OBJECT:
            raise TypeError("not a list, dict or set")

    def _tuple(self, start: int) -> None:
        values = self._stack[start:]
        size = 2 + sum(max(1, abs(v)) for v in values)
        if size > MAX_TUPLE:
            raise refused(f"it holds a tuple of more than {MAX_TUPLE} values, which no state_dict has")
        self._stack[start:] = [size if all(v == _SCALAR for v in values) else -size]

    def _global(self) -> None:
        module, name = self._line(), self._line()
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        if path in _FUNCTIONS:
            self._stack.append(_FUNCTION)
        elif (module in _STORAGES and name.endswith("Storage")) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            self._stack.append(_SCALAR)
        elif module == "torch._tensor" or path.startswith("torch._utils._rebuild"):
            raise refused(f"it holds a tensor that needs {name}; only plain dense ones can be served")
        else:
            raise refused(
                f"it holds a pickled object ({path[:100]}), not just tensors, and loading it could run any code; it "
                "looks like torch.save(model): save the weights instead, torch.save(model.state_dict(), 'model.pt')"
            )

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if function != _FUNCTION or abs(arguments) < 2:
            raise TypeError("not a function and its arguments")
        self._stack.append(_OBJECT)

    def _build(self) -> None:
        self._pop()
        if self._stack[self._below(1)] != _OBJECT:
            raise TypeError("not an object")

    def _persistent(self) -> None:
        if self._pop() < 2:
            raise TypeError("not the name of a storage")
        self._stack.append(_OBJECT)

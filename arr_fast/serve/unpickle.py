"""Reads pickles of plain data, and nothing else.

Two locks. First the opcodes are scanned, without executing any: only those that build plain data
are admitted, and memo indices must be small (a large one makes the unpickler allocate gigabytes).
Keys of dicts and members of sets must be simple: tuples are hashed recursively, which a shared one
makes exponential and a deep one a crash, and long integers may be chosen to collide. Then an
unpickler that can import nothing reads the data.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, NoReturn

from arr_fast.serve.failures import BadRequestError

MAX_OPCODES = 1_000_000
MAX_DEPTH = 32

# What protocols 2 to 5 write for None, bools, numbers, str, bytes, list, tuple, dict and set.
_PLAIN = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS"),
        *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    )
)
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")
# What takes objects from the stack: how many, or None for all above the last mark.
_TAKES = {
    **{"APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "STOP": 1},
    **{"APPENDS": None, "SETITEMS": None, "ADDITEMS": None, "TUPLE": None},
}
_CONTAINERS = frozenset(
    (
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
    )
)
_MAKES_NOTHING = ("PROTO", "FRAME", "STOP", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows no class and no persistent id."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("persistent ids are not plain data")

    def get_extension(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError("extension codes are not plain data")


def load_plain(data: bytes) -> Any:
    """Reads one pickle of containers, bytes, str and numbers.

    Args:
        data: The pickle; protocol 2 or later.

    Raises:
        BadRequestError: It holds anything else, is damaged, or is built to exhaust the reader.
    """
    try:
        _scan(data)
        value = _PlainUnpickler(io.BytesIO(data)).load()
    except BadRequestError:
        raise
    except Exception as error:
        raise BadRequestError(f"not a pickle of plain data: {type(error).__name__}") from None
    _check(value)
    return value


def _scan(data: bytes) -> None:
    stack = _KeyStack()
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        if opcode.name not in _PLAIN:
            raise BadRequestError(f"pickle opcode {opcode.name} at {position} is not plain data")
        if opcode.name in _PUTS and (not isinstance(argument, int) or argument > count):
            raise BadRequestError(f"pickle memo index {argument} at {position} is out of order")
        if count >= MAX_OPCODES:
            raise BadRequestError(f"the pickle has over {MAX_OPCODES} opcodes")
        if not all(stack.step(opcode.name, argument)):
            raise BadRequestError(
                f"pickle opcode {opcode.name} at {position}: a key must be text, bytes, None or a "
                "number of at most 64 bits"
            )


class _KeyStack:
    """The unpickler's stack and memo, with only this of each object: whether it may be a key."""

    def __init__(self) -> None:
        self._stack: list[bool | None] = []  # None is a mark
        self._memo: dict[Any, bool | None] = {}

    def step(self, name: str, argument: Any) -> list[bool | None]:
        """Executes an opcode; returns what it hashes."""
        if name in _PUTS or name == "MEMOIZE":
            self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
        elif name in _GETS:
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            self._stack.append(None)
        else:
            taken = self._take(_TAKES[name]) if name in _TAKES else []
            if name not in _MAKES_NOTHING:
                is_long = isinstance(argument, int) and not -(2**63) <= argument < 2**63
                self._stack.append(name not in _CONTAINERS and not is_long)
            if name in ("SETITEM", "SETITEMS"):
                return taken[::2]
            if name == "ADDITEMS":
                return taken
        return []

    def _take(self, count: int | None) -> list[bool | None]:
        """Removes so many objects, or all above the last mark with the mark."""
        taken: list[bool | None] = []
        while count is None or len(taken) < count:
            taken.append(self._stack.pop())
            if count is None and taken[-1] is None:
                taken.pop()
                break
        taken.reverse()
        return taken


def _check(value: Any) -> None:
    """Bounds depth and size as they are walked: shared references may unfold exponentially."""
    steps = 0
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        steps += 1
        if depth > MAX_DEPTH or steps > MAX_OPCODES:
            raise BadRequestError("the pickle is nested too deeply or refers to itself")
        if isinstance(item, dict):
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set):
            stack += [(part, depth + 1) for part in item]

"""The restricted unpickler: plain data goes through, every gadget is refused, unexecuted."""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import os
import pickle
import struct
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.unpickle import load_plain

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        | st.sets(st.integers(-(2**63), 2**63 - 1), max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_round_trips(value, protocol):
    assume(protocol >= 4 or is_plain_in(value, protocol))
    assert load_plain(pickle.dumps(value, protocol=protocol)) == value


def is_plain_in(value, protocol: int) -> bool:
    """Protocols 2 and 3 write sets, and protocol 2 bytes, by importing builtins."""
    if isinstance(value, dict):
        return all(is_plain_in(v, protocol) for v in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain_in(v, protocol) for v in value)
    return not isinstance(value, set | (bytes if protocol == 2 else set))


class Reduce:
    """Pickles to a call of anything."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class State:
    def __setstate__(self, state):
        raise AssertionError("executed")

    def __getstate__(self):
        return {"x": 1}


Point = collections.namedtuple("Point", "x y")


def gadgets() -> dict[str, bytes]:
    touch = "touch MARK"
    objects = {
        "os.system": Reduce(os.system, (touch,)),
        "subprocess.Popen": Reduce(subprocess.Popen, ((["touch", "MARK"]),)),
        "subprocess.check_output": Reduce(subprocess.check_output, (["touch", "MARK"],)),
        "eval": Reduce(builtins.eval, ("open('MARK', 'w')",)),
        "exec": Reduce(builtins.exec, ("open('MARK', 'w')",)),
        "open": Reduce(builtins.open, ("MARK", "w")),
        "getattr": Reduce(builtins.getattr, (1, "real")),
        "import": Reduce(builtins.__import__, ("os",)),
        "bytearray": bytearray(b"x"),
        "complex": 1j,
        "range": range(3),
        "frozenset": frozenset([1]),
        "partial": partial(os.system, touch),
        "object with state": State(),
        "class": State,
        "function": os.getcwd,
        "namedtuple": Point(1, 2),
        "OrderedDict": collections.OrderedDict(a=1),
        "defaultdict": collections.defaultdict(list),
        "deque": collections.deque([1]),
        "datetime": datetime.datetime(2026, 1, 1),
        "Decimal": decimal.Decimal("1"),
        "numpy array": np.zeros(2),
        "numpy scalar": np.float32(1),
        "tensor": torch.zeros(1),
        "exception": ValueError("x"),
        "slice": slice(1),
    }
    found = {}
    for name, value in objects.items():
        for protocol in range(2, 6):
            # A bytearray is a plain opcode only in protocol 5, and not one that is admitted.
            found[f"{name}-{protocol}"] = pickle.dumps({"images": [value]}, protocol=protocol)
    hand = {
        "GLOBAL and REDUCE": b"cos\nsystem\n(S'touch MARK'\ntR.",
        "INST": b"(S'touch MARK'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch MARK'\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch MARK\x85R.",
        "NEWOBJ": b"\x80\x02c__builtin__\nobject\n)\x81.",
        "NEWOBJ_EX": b"\x80\x04cbuiltins\nobject\n)}\x92.",
        "BUILD": b"\x80\x02}}b.",
        "EXT1": b"\x80\x02\x82\x01.",
        "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "PERSID": b"Pid\n.",
        "BINPERSID": b"\x80\x02K\x01Q.",
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "huge memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "memo index out of order": b"\x80\x02Nq\x09.",
        "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
        "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        "truncated": pickle.dumps({"a": [1, 2, 3]})[:-3],
        "empty": b"",
        "text": b"hello",
        "json": b'{"images": []}',
        "unbalanced": b"\x80\x02t.",
        "nothing on the stack": b"\x80\x02.",
        "unhashable key": b"\x80\x02}]Ns.",
        "protocol 9": b"\x80\x09N.",
        "protocol 0 number": b"I1\n.",
        "long decimal": b"L" + b"9" * 100_000 + b"L\n.",
        "two pickles, second evil": b"\x80\x02N0cos\nsystem\n(S'touch MARK'\ntR.",
    }
    return {**found, **hand}


GADGETS = gadgets()


@pytest.mark.parametrize("name", GADGETS)
def test_gadgets_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequestError):
        load_plain(GADGETS[name])
    assert not list(tmp_path.iterdir())


def test_the_corpus_is_live(tmp_path, monkeypatch):
    """The same bytes do execute under pickle itself, or refusing them would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system-4", "eval-4", "open-2", "GLOBAL and REDUCE", "OBJ", "INST"):
        pickle.loads(GADGETS[name])
        assert (tmp_path / "MARK").exists(), name
        (tmp_path / "MARK").unlink()


def test_nested_and_self_referring_data_is_refused():
    deep: list = []
    for _ in range(200):
        deep = [deep]
    loop: list = []
    loop.append(loop)
    bomb: list = ["x"]
    for _ in range(30):
        bomb = [bomb, bomb]
    for value in (deep, loop, bomb):
        with pytest.raises(BadRequestError, match="nested"):
            load_plain(pickle.dumps(value))


def bombs() -> dict[str, bytes]:
    """Keys whose hash takes long, or takes the stack: C never checks how deep it hashes."""
    twice = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(40))
    deep = b"N" + b"\x85" * 200_000
    long = pickle.dumps({(2**61 - 1) * 2**70: 1}, protocol=2)
    return {
        "shared tuples": b"\x80\x02}Nq\x00" + twice + b"Ns.",
        "shared tuples, all at once": b"\x80\x02}(Nq\x00" + twice + b"Nu.",
        "shared tuples in a set": b"\x80\x04\x8f(Nq\x00" + twice + b"\x90.",
        "from the memo": b"\x80\x04]N\x85\x94a}h\x00Nsa.",
        "deep tuple": b"\x80\x02}" + deep + b"Ns.",
        "empty tuple": b"\x80\x02})Ns.",
        "long integer": long,
    }


@pytest.mark.parametrize("name", bombs())
def test_keys_that_are_slow_to_hash_are_refused_unhashed(name):
    with pytest.raises(BadRequestError, match="a key must be"):
        load_plain(bombs()[name])


def test_shared_tuples_are_plain_data_where_they_are_no_keys():
    size = (512, 512)
    payload = {"images": [b"x"] * 2, "meta_datas": [{"size": size, "n": 2**70}] * 2, None: {1, "a"}}
    payload["sizes"] = (size, size)
    for protocol in (4, 5):
        assert load_plain(pickle.dumps(payload, protocol=protocol)) == payload


@given(st.binary(max_size=200))
def test_noise_is_refused_or_plain(data):
    try:
        value = load_plain(data)
    except BadRequestError:
        return
    assert isinstance(value, None | bool | int | float | str | bytes | list | tuple | dict | set)


def test_both_locks_hold_alone(monkeypatch):
    """Even if the opcode scan let everything pass, nothing could be imported."""
    monkeypatch.setattr("arr_fast.serve.unpickle._scan", lambda data: None)
    for name in ("os.system-4", "GLOBAL and REDUCE", "INST", "OBJ", "NEWOBJ", "EXT1", "PERSID"):
        with pytest.raises(BadRequestError):
            load_plain(GADGETS[name])

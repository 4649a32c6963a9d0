"""What the fuzz tests share: how hard they try, how inputs are damaged, and what may come of it."""

import os
import struct

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jaxunlearn.errors import UserError

# The same examples in every run, so that a failure is a change's. FUZZ_EXAMPLES=10000 searches for new ones.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def fuzzed(examples: int) -> settings:
    """Settings with so many examples, unless a search asks for its own number."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(call, *arguments):
    """What a call returns, or None where it refuses its input as it may: by a UserError, in one line."""
    try:
        return call(*arguments)
    except UserError as error:
        assert str(error) and str(error).isprintable()
        return None


class Trap:
    """Makes the file `sprung` when what it is pickled to is called."""

    def __reduce__(self):
        return open, ("sprung", "w")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty folder to work in. Fails where the trap was sprung."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    yield tmp_path
    assert not (tmp_path / "sprung").exists()


SIZES = (0, 1, 0x7F, 0xFF, 0x7FFF, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """A good file with a few bytes flipped, left out, put in, copied elsewhere, made extreme numbers, or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        near = min(len(data), draw(st.sampled_from([16, 600, 10**9])))  # headers are at the ends
        at = draw(st.integers(0, max(0, near - 1)))
        at = at if draw(st.booleans()) else len(data) - at
        kind = draw(st.sampled_from(["cut", "flip", "drop", "insert", "copy", "number"]))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 600))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "copy":
            start, length = draw(st.integers(0, len(data))), draw(st.integers(1, 600))
            data[at : at + length] = data[start : start + length]
        else:
            number = struct.pack(draw(st.sampled_from("<>")) + "Q", draw(st.sampled_from(SIZES)))
            number = number[draw(st.integers(0, 4)) :][:4] if draw(st.booleans()) else number
            data[at : at + len(number)] = number
    return bytes(data)


def _text(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


_GLOBALS = (
    ("os", "system"), ("posix", "system"), ("builtins", "open"), ("builtins", "eval"), ("__builtin__", "open"),
    ("builtins", "getattr"), ("io", "open"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.numeric", "_frombuffer"), ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"), ("torch.serialization", "load"),
)  # fmt: skip
_TEXTS = b"data,labels,fine_labels,sprung,w,touch sprung,u1,|,C"
_NUMBERS = st.sampled_from([0, 1, 3, 255, 2**20, 2**30])
_SIMPLE = b"()}]tldaesubRo\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x9402NQ."
_OPCODES = st.one_of(
    st.sampled_from(_SIMPLE).map(lambda code: bytes([code])),
    st.sampled_from([f"c{module}\n{name}\n".encode() for module, name in _GLOBALS]),
    st.sampled_from([f"i{module}\n{name}\n".encode() for module, name in _GLOBALS]),
    st.sampled_from([_text(text.encode()) + b"\x93" for pair in _GLOBALS for text in pair]),
    st.sampled_from(_TEXTS.split(b",")).map(_text),
    st.sampled_from([b"C\x01\x07", b"U\x02ab", b"I12\n", b"L9999999999L\n", b"K\x05", b"J\xff\xff\xff\xff", b"Pid\n"]),
    _NUMBERS.map(lambda number: b"r" + struct.pack("<I", number)),  # LONG_BINPUT
    _NUMBERS.map(lambda number: b"j" + struct.pack("<I", number)),  # LONG_BINGET
    st.sampled_from(SIZES).map(lambda size: b"\x8e" + struct.pack("<Q", size) + b"ab"),  # BINBYTES8
    st.sampled_from(SIZES).map(lambda size: b"\x96" + struct.pack("<Q", size) + b"ab"),  # BYTEARRAY8
    st.sampled_from(SIZES).map(lambda size: b"\x95" + struct.pack("<Q", size)),  # FRAME
    st.sampled_from([f"c{m}\n{n}\n".encode() + b"(" + _text(b"sprung") + _text(b"w") + b"tR" for m, n in _GLOBALS]),
    st.sampled_from([f"c{m}\n{n}\n".encode() + b"(" + _text(b"touch sprung") + b"tR" for m, n in _GLOBALS]),
)

# Pickles of any opcodes, many of which ask for a call.
programs = st.lists(_OPCODES, max_size=25).map(lambda codes: b"\x80\x02" + b"".join(codes) + b".")

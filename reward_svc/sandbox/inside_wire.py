"""Within the sandbox: plain values as JSON between a solution and the tests, which run in different sandboxes.

Only data crosses. An object that is more than data stays where it is and crosses as a handle, so that no code of the
solution, a lying `__eq__` for example, ever runs where the verdict is made.
"""

import collections
import datetime
import decimal
import fractions
import json
import os
import struct

MAX_MESSAGE = 16 << 20


def encode(value, keep):
    """A value as JSON; `keep` gives the handle of an object that is no plain data."""
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return {"i": hex(value)}
    if type(value) is float:
        return {"f": value.hex()}
    if type(value) is complex:
        return {"c": [value.real.hex(), value.imag.hex()]}
    if type(value) in (bytes, bytearray):
        return {"b": value.hex()}
    if type(value) is decimal.Decimal:
        return {"D": str(value)}
    if type(value) is fractions.Fraction:
        return {"F": [hex(value.numerator), hex(value.denominator)]}
    if type(value) is range:
        return {"r": [hex(item) for item in (value.start, value.stop, value.step)]}
    if type(value) is datetime.timedelta:
        return {"T": [value.days, value.seconds, value.microseconds]}
    if type(value) in _DATES:
        return {"t+": [type(value).__name__, value.isoformat()]}
    if isinstance(value, tuple) and type(getattr(value, "_fields", None)) is tuple:
        return {"n": [list(value._fields), [encode(item, keep) for item in tuple.__iter__(value)]]}
    if isinstance(value, dict):
        return {"d": [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]}
    for name, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, kind):
            return {name: [encode(item, keep) for item in kind.__iter__(value)]}
    return {"h": keep(value)}


def decode(data, remote):
    """The value; `remote` makes what stands for a handle."""
    if not isinstance(data, dict):
        return data
    ((name, value),) = data.items()
    if name in _SIMPLE:
        return _SIMPLE[name](value)
    if name == "d":
        return {decode(key, remote): decode(item, remote) for key, item in value}
    if name == "h":
        return remote(value)
    if name == "n":  # a named tuple is a tuple with names, whatever else its class has
        return collections.namedtuple("Result", value[0])(*(decode(item, remote) for item in value[1]))
    return _CONTAINERS[name](decode(item, remote) for item in value)


_DATES = (datetime.datetime, datetime.date, datetime.time)
_SIMPLE = {
    "r": lambda value: range(*(int(item, 16) for item in value)),
    "T": lambda value: datetime.timedelta(*value),
    "t+": lambda value: {kind.__name__: kind for kind in _DATES}[value[0]].fromisoformat(value[1]),
    "i": lambda value: int(value, 16),
    "f": float.fromhex,
    "c": lambda value: complex(*map(float.fromhex, value)),
    "b": bytes.fromhex,
    "D": decimal.Decimal,
    "F": lambda value: fractions.Fraction(int(value[0], 16), int(value[1], 16)),
}
_CONTAINERS = {"l": list, "t": tuple, "s": set, "z": frozenset}


class Channel:
    """JSON messages over a socket, each after its length."""

    def __init__(self, fd):
        self._fd = fd

    def send(self, message):
        data = json.dumps(message).encode()
        data = struct.pack(">I", len(data)) + data
        while data:
            data = data[os.write(self._fd, data) :]

    def receive(self):
        """The next message. Raises EOFError at the end, or for one that is too long."""
        (length,) = struct.unpack(">I", self._read(4))
        if length > MAX_MESSAGE:
            raise EOFError("too long a message")
        return json.loads(self._read(length))

    def _read(self, count):
        data = b""
        while len(data) < count:
            piece = os.read(self._fd, min(count - len(data), 1 << 16))
            if not piece:
                raise EOFError("the other end is gone")
            data += piece
        return data

"""Numbers as people read them."""

from __future__ import annotations


def seconds(value: float) -> str:
    """`850 ms`, `12.3 s`, `1:02:03`."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    return clock(value)


def clock(value: float) -> str:
    """`0:05`, `12:34`, `1:02:03`."""
    total = round(value)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(value: float) -> str:
    """`950`, `12.3k`, `1.2M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def size(num_bytes: float) -> str:
    """`512 B`, `1.5 KiB`, `20.0 MiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def percent(fraction: float) -> str:
    """`0.4%`."""
    return f"{fraction * 100:.1f}%"


def one_line(text: str, width: int) -> str:
    """The text on one line, control characters shown, at most `width` characters."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"

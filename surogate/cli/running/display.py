"""Displays of a running job: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import TextIO

from surogate.cli.running import words
from surogate.cli.running.progress import Progress
from surogate.v1 import job_pb2


class Display(ABC):
    """Shows events as they come. `progress` has taken in the event already."""

    @abstractmethod
    def show(self, event: job_pb2.JobEvent, progress: Progress) -> None:
        """Shows an event."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Shows a line of the command's own."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the terminal in order; nothing is shown after."""


class PlainDisplay(Display):
    """A line for each step and event."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._last = ""

    def show(self, event: job_pb2.JobEvent, progress: Progress) -> None:
        """Writes the line of the event, if it has one."""
        if event.HasField("step_completed"):
            self.say(words.step_line(progress, replayed=event.step_completed.replayed))
        elif line := words.notice(event):
            self.say(line)

    def say(self, text: str) -> None:
        """Writes a line, at once, unless it repeats the one before."""
        if text == self._last:
            return
        self._last = text
        self._out.write(f"{text}\n")
        self._out.flush()

    def close(self) -> None:
        """Nothing to put in order."""

"""The worker's end of `WorkerPool`: answers JSON lines until its input ends."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from surogate.process import die_with_parent

MEMORY = 2 << 30
"""Address space of a worker, in bytes."""

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def serve(handler: Handler) -> None:
    """Answers each request, an empty one with an empty answer, on what was standard output; prints go nowhere."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(handler(request) if request else {}) + "\n")
        answers.flush()

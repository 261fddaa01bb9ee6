"""Whether kernels can be made on this machine."""

from __future__ import annotations

import os
import shutil
from functools import cache


@cache
def can_compile() -> bool:
    """Whether kernels can be built: Triton needs a C compiler to start them."""
    given = os.environ.get("CC")
    return any(shutil.which(name) for name in ([given] if given else ["gcc", "clang"]))

"""What all tests share: caches of their own, one thread of torch, no limits on time for Hypothesis."""

from __future__ import annotations

import os
import tempfile

from hypothesis import HealthCheck, settings

_CACHE = tempfile.TemporaryDirectory(prefix="surogate-test-cache-")
os.environ["SUROGATE_CACHE_DIR"] = _CACHE.name

# Models of the tests are tiny: more threads would only wait for each other, in child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more of the machine than of the code.
settings.register_profile("surogate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("surogate")

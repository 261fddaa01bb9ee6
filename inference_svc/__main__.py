"""`python -m inference_svc`."""

from __future__ import annotations

import sys

from inference_svc.settings import InferenceSettings
from surogate import service


def main() -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    return service.main(InferenceSettings, "inference_svc.lifespan:lifespan", prog="surogate-inference")


if __name__ == "__main__":
    sys.exit(main())

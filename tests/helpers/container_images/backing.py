"""An S3 store and a collector of traces, as a process of its own: in the network of containers, which have the loopback
alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.collector import collecting
from tests.helpers.object_store import BUCKET, Store

ROOT = Path(__file__).parents[3]
STORE_PORT, COLLECTOR_PORT = 9000, 4317
ENVIRONMENT = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{STORE_PORT}",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",  # pragma: allowlist secret
    "AWS_DEFAULT_REGION": "us-east-1",
    "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{COLLECTOR_PORT}",
}
"""What services are told of them."""


class Backing:
    """The process; the store holds the files of a folder, by their paths in it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def end(self) -> tuple[set[str], list[tuple[str, str, str]]]:
        """Ends it: the keys in the store; service, name and trace of all spans."""
        out, _ = self._process.communicate("\n", timeout=30)
        found = json.loads(out)
        return set(found["keys"]), [(service, name, trace) for service, name, trace in found["spans"]]


@contextmanager
def backing(enter: Sequence[str], folder: Path) -> Iterator[Backing]:
    """Runs both, with the command before theirs that enters the network."""
    command = [*enter, sys.executable, "-m", __name__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield Backing(process)
        finally:
            process.kill()


def main(folder: Path) -> None:
    """Runs until a line comes, and then prints what it has."""
    store = Store(STORE_PORT)
    for path in filter(Path.is_file, folder.rglob("*")):
        store.put(str(path.relative_to(folder)), path.read_bytes())
    with collecting(COLLECTOR_PORT) as collector:
        print("ready", flush=True)
        sys.stdin.readline()
        spans = [(span.service, span.name, span.trace.hex()) for span in collector.spans]
        print(json.dumps({"keys": store.stored(), "spans": spans}))
    store.close()


def url(key: str) -> str:
    """Where a file of the folder is."""
    return f"s3://{BUCKET}/{key}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""An S3 store for tests: moto's server on a loopback port, and ways to make it fail."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"


class Store:
    """One bucket. `fail(request)` may return a status to answer in place of the store, by method and path."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[tuple[str, str]] = []
        self.fail: Any = lambda method, path: None
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", port, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",  # pragma: allowlist secret
        )
        reset = urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")  # it keeps objects in the process
        urllib.request.urlopen(reset).close()
        self.requests.clear()
        self.client.create_bucket(Bucket=BUCKET)

    def stored(self, prefix: str = "") -> list[str]:
        """Keys of the bucket's objects."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for item in found.get("Contents", [])]

    def put(self, key: str, content: bytes) -> None:
        """Writes an object."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: Any, start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        status = self.fail(method, path)
        if status is not None:
            start_response(status, [("Content-Length", "0")])
            return [b""]
        return self._app(environ, start_response)


@contextmanager
def object_store(patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store that this process and its children find by their environment."""
    store = Store()
    try:
        for name, value in environment(store).items():
            patch.setenv(name, value)
        yield store
    finally:
        store.close()


def environment(store: Store) -> dict[str, str]:
    """The variables by which clients find a store."""
    return {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",  # pragma: allowlist secret
        "AWS_DEFAULT_REGION": "us-east-1",
    }

"""Images of the services in examples/custom_reward, built as their pages say, on stand-ins of their bases."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.helpers.container_images.containers import BASE, Engine

NODE_BASE = "localhost/node-stand-in:test"
PORT = 50080
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
NO_REGISTRY = ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH")
"""What npm says where it reaches no registry."""


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    """Serves a folder on a loopback port; yields its URL."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def no_node() -> str:
    """Why there can be no stand-in of a base with Node; empty if there can."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "needs node and npm"
    return ""


def make_node_base(engine: Engine) -> None:
    """The other stand-in with this machine's Node and npm, and the authorities that it trusts."""
    node, npm = (Path(shutil.which(name) or "").resolve() for name in ("node", "npm"))
    folder = engine.folder / "node"
    folder.mkdir(exist_ok=True)
    shutil.copy(node, folder / "node")
    shutil.copytree(npm.parents[1], folder / "npm", symlinks=True, dirs_exist_ok=True)
    shutil.copy(_CERTIFICATES, folder / "authorities.crt")
    lines = [
        f"FROM {BASE}",
        "COPY node /usr/local/bin/node",
        "COPY npm /usr/local/lib/node_modules/npm",
        f"COPY authorities.crt {_CERTIFICATES}",
        f"ENV NODE_EXTRA_CA_CERTS={_CERTIFICATES}",
        "RUN ln -s ../lib/node_modules/npm/bin/npm-cli.js /usr/local/bin/npm && node --version && npm --version",
    ]
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
    engine.run("buildah", "bud", "--isolation=chroot", f"--tag={NODE_BASE}", str(folder), timeout=300)
    shutil.rmtree(folder)


def build(engine: Engine, checkout: Path, example: str, *flags: str, check: bool = True) -> str:
    """Builds an example from the root of a checkout; what the build said."""
    file = f"examples/custom_reward/{example}/Dockerfile"
    tag = [f"--tag=vowel-reward-{example}", f"--file={checkout / file}"]
    ignored = f"--ignorefile={checkout / file}.dockerignore"  # which Docker finds by its name
    return engine.run(
        "buildah", "bud", "--isolation=chroot", ignored, *flags, *tag, str(checkout), timeout=600, check=check
    )


def check_contract(engine: Engine, example: str, environment: str) -> str:
    """Runs an example's image, locked down as a pod of a job, and has it checked as its page says; the report."""
    name = f"example-{example}"
    engine.start(name, f"vowel-reward-{example}")
    try:
        enter = engine.entering(name)
        engine.run(*enter, sys.executable, "-c", _WAIT)
        command: Sequence[str] = ["reward", "check", f"127.0.0.1:{PORT}", "--env", environment]
        report = engine.run(*enter, sys.executable, "-m", "surogate.cli.main", *command)
        assert engine.stop(name) == 0
        return report
    finally:
        engine.remove(name)


_WAIT = f"""
import socket, time
for _ in range(300):
    try:
        socket.create_connection(("127.0.0.1", {PORT}), 1).close()
        break
    except OSError:
        time.sleep(0.1)
else:
    raise SystemExit("nobody listens")
"""

"""Images built and containers run without a daemon: buildah, podman and runc, with a storage of the test's own.

The base image's stand-in is a Debian tree made by mmdebstrap, so that no image registry is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]
STORAGE = Path(os.environ["SUROGATE_E2E_STORAGE"]).absolute() if "SUROGATE_E2E_STORAGE" in os.environ else None
"""Where images are kept from one run to the next; without it they are removed."""
TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
BASE = "localhost/python-stand-in:test"
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
_PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates,tini,bubblewrap,libnuma1"

# What the manifests demand of every container.
LOCKED = (
    "--read-only",
    "--read-only-tmpfs=false",
    "--user=10001",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp:mode=1777",
    "--tmpfs=/home/surogate:mode=0700,U",
)


def missing() -> str:
    """Why images cannot be built here; empty if they can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian packages of these names)"
    if os.geteuid() != 0:
        return "needs root: mmdebstrap and runc make root file systems"
    if sys.version_info[:2] != (3, 11):
        return "needs Python 3.11, which is the stand-in's"
    return ""


def _in_memory(folder: Path) -> str:
    """A place for temporary files of some GB: memory if there is plenty, else the folder."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 8 << 30:
        return str(memory)
    return str(folder)


class Engine:
    """buildah and podman on a storage in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        conf, self._storage = folder / "containers.conf", folder / "storage.conf"
        conf.write_text(
            '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\nevents_logger = "file"\n'
        )
        self._environment = os.environ | {
            "CONTAINERS_CONF": str(conf),
            "CONTAINERS_STORAGE_CONF": str(self._storage),
            "ENGINE": "buildah",
            "ENGINE_FLAGS": "--isolation chroot",
            "PYTHON_IMAGE": BASE,
            "SOURCE_DATE_EPOCH": "1700000000",
            "TMPDIR": _in_memory(folder),  # a layer on its way is written twice more
        }
        self._choose_storage()

    def _choose_storage(self) -> None:
        """overlay; where the file system below cannot carry it (another overlay), by FUSE; else plain copies."""
        fuse = '[storage.options.overlay]\nmount_program = "/usr/bin/fuse-overlayfs"\n'
        for driver, options in (("overlay", ""), ("overlay", fuse), ("vfs", "")):
            self._storage.write_text(
                f'[storage]\ndriver = "{driver}"\ngraphroot = "{self.folder}/storage"\nrunroot = "{self.folder}/run"\n'
                + options
            )
            if "graphDriverName" in self.podman("info", check=False):
                return
        raise AssertionError(self.podman("info", check=False))

    def run(self, *command: str, timeout: float = 120, check: bool = True, **environment: str) -> str:
        """Runs a command with this storage; its output, both streams. Raises AssertionError if it fails."""
        ran = subprocess.run(
            command,
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert ran.returncode == 0 or not check, f"{' '.join(command)}: {ran.stdout[-4000:]}"
        return ran.stdout

    def podman(self, *arguments: str, check: bool = True) -> str:
        """`podman ARGUMENTS`."""
        return self.run("podman", *arguments, check=check, timeout=900).strip()

    def has_image(self, image: str) -> bool:
        """Whether the storage has it."""
        return bool(self.podman("images", "--quiet", image))

    def make_base(self) -> None:
        """The stand-in of the base image, unless it is there."""
        if self.has_image(BASE):
            return
        tree = self.folder / "tree.tar"
        wanted = ["--quiet", "--variant=minbase", f"--include={_PACKAGES}"]
        self.run("mmdebstrap", *wanted, "bookworm", str(tree), timeout=600)
        self.podman("import", str(tree), BASE)
        tree.unlink()

    def collect_wheels(self, checkout: Path, targets: Sequence[str]) -> None:
        """`make wheels`, by the Python that runs the tests."""
        script = checkout / "images" / "wheels.sh"
        self.run(str(script), "images/wheels", *targets, timeout=600, PYTHON=sys.executable)

    def build(self, checkout: Path, targets: Sequence[str], *flags: str) -> str:
        """`make images`, without any network: everything comes from the wheels and the base."""
        more = " ".join(["--isolation", "chroot", *flags])
        return self.run(str(checkout / "images" / "build.sh"), *targets, timeout=1500, ENGINE_FLAGS=more)

    def start(self, name: str, image: str, *arguments: str, flags: Sequence[str] = (), network: str = "none") -> None:
        """Starts a container, locked down as the manifests have it."""
        self.podman("run", "--detach", "--name", name, *LOCKED, f"--network={network}", *flags, image, *arguments)

    def python(self, container: str, program: str) -> str:
        """Runs a program with the Python of a running container."""
        return self.podman("exec", container, "python", "-c", program)

    def wait_serving(self, container: str, service: str, port: int = 50051, seconds: float = 120) -> None:
        """Waits until a service in a container reports SERVING."""
        program = (
            "import asyncio\n"
            "from surogate.rpc.channel import ClientSecurity, open_channel\n"
            "from surogate.rpc.health import wait_serving\n"
            "async def main():\n"
            f"    async with open_channel('127.0.0.1:{port}', ClientSecurity()) as channel:\n"
            f"        await wait_serving(channel, '{service}', timeout={seconds})\n"
            "asyncio.run(main())\n"
        )
        self.podman("exec", container, "python", "-c", program)

    def layers(self, image: str) -> list[str]:
        """Digests of its layers, from the base on."""
        found: list[str] = json.loads(self.podman("inspect", image))[0]["RootFS"]["Layers"]
        return found

    def status(self, container: str) -> dict[str, str]:
        """Fields of /proc/1/status in a running container."""
        lines = self.podman("exec", container, "cat", "/proc/1/status").splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    def entering(self, container: str) -> list[str]:
        """What runs a command of this machine in the network of a container."""
        pid = self.podman("inspect", "--format={{.State.Pid}}", container)
        return ["nsenter", f"--target={pid}", "--net", "--"]

    def stop(self, container: str) -> int:
        """Asks a container to end; its exit code."""
        self.podman("stop", "--time=40", container)
        return int(self.podman("inspect", "--format={{.State.ExitCode}}", container))

    def remove(self, *containers: str) -> None:
        """Removes containers, which may not be there; says what they said, for a test that failed."""
        for container in containers:
            print(container, self.podman("logs", "--tail=40", container, check=False))
            self.podman("rm", "--force", "--time=2", container, check=False)

    def close(self) -> None:
        """Removes every container; and every image, and what the storage has mounted, unless they are kept."""
        self.podman("rm", "--all", "--force", "--time=2", check=False)
        if self.folder == STORAGE:
            return
        self.podman("system", "prune", "--all", "--force", "--volumes", check=False)
        for attempt in range(5):
            self._unmount()
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(attempt)

    def _unmount(self) -> None:
        """Unmounts all below the folder: builds leave mounts that neither buildah nor podman knows any more."""
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in sorted((mount for mount in mounts if Path(mount).is_relative_to(self.folder)), reverse=True):
            self.run("umount", mount, check=False)

"""What a URL names, as files of this machine: fetched once, whole or not at all, and again when it changes."""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from surogate.caches import cache_root
from surogate.errors import ConfigError, DataLossError, SurogateError, Violation
from surogate.storage.objects import Item, Objects
from surogate.storage.whole import new_folder
from surogate.telemetry.log import get_logger
from surogate.urls import is_url, join

TEXT = re.compile(r".*\.(json|jinja|txt|model|tiktoken)")
"""Files of a model beside its weights: configuration, tokenizer, template."""

_AT_ONCE = 8
_log = get_logger("storage")


def local(value: str, key: str, *, only: re.Pattern[str] | None = None) -> str:
    """`value`, or the path of what it names if it is a URL.

    Args:
        value: A path, a name on the hub, or `s3://BUCKET/KEY` of an object or of all objects below a prefix.
        key: The key of the configuration that has it, for errors.
        only: Of a prefix, the names to fetch; None is all.

    Raises:
        ConfigError: Names the key: nothing is there, or it may not be read.
        StorageError: The store does not answer.
        DataLossError: The disk refuses.
    """
    return str(fetch(value, key, only=only)) if is_url(value) else value


def fetch(url: str, key: str, *, only: re.Pattern[str] | None = None) -> Path:
    """The file or folder that a URL names, in the cache. See `local`."""
    objects = Objects(key)
    items = [item for item in objects.items(url) if not item.name.endswith("/")]
    if not items:
        raise ConfigError.of([Violation(key, f"there is nothing at {url}")])
    wanted = [item for item in items if not item.name or only is None or only.fullmatch(item.name)]
    _check_names(wanted, url, key)
    digest = hashlib.sha256(repr((url, wanted)).encode()).hexdigest()[:24]
    folder = cache_root("objects") / digest
    name = Path(url.rstrip("/")).name
    with locked(folder.with_name(f".{digest}.lock")):
        if not folder.is_dir():
            _log.info("fetching", url=url, bytes=sum(item.size for item in wanted))
            write_folder(folder, lambda part: _download(objects, url, wanted, part / name))
    return folder / name


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Has `fill` write into a temporary folder that then becomes `folder`: whole, or not there.

    Raises DataLossError if the disk refuses, and whatever `fill` raises.
    """
    try:
        with new_folder(folder) as part:
            fill(part)
    except SurogateError:
        raise
    except OSError as error:
        raise DataLossError(f"could not write {folder}: {error}") from error


def _download(objects: Objects, url: str, items: list[Item], target: Path) -> None:
    def one(item: Item) -> None:
        path = target / item.name if item.name else target
        objects.get(join(url, item.name) if item.name else url, path)
        if path.stat().st_size != item.size:
            raise DataLossError(f"{url}: {item.name or path.name} came with another size than the store says")

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as pool:
        list(pool.map(one, items))


def _check_names(items: list[Item], url: str, key: str) -> None:
    """Refuses names that would be written outside of the cache."""
    bad = [item.name for item in items if item.name.startswith("/") or {"..", "."} & set(item.name.split("/"))]
    if bad:
        raise ConfigError.of([Violation(key, f"{url} has an object of the name {bad[0]!r}, which is no file's")])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the others find what it fetched."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

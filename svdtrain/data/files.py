"""Writing that survives a kill at any moment, and one process at a time."""

from __future__ import annotations

import contextlib
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Write `path` so that readers see the old file or the whole new one, never a part. Creates the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # not mkstemp: others may read a shared cache
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, where the system can."""
    with contextlib.suppress(OSError):  # some network and non-POSIX file systems cannot sync a directory
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock on the file `path`; `on_wait` is called once if another process has it.

    The system frees it when the holder dies. Where it has no file locks (some network file systems) this warns and
    goes on: do not rely on it for integrity. filelock would leave a lock file there that outlives a killed process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            reason = f"no file locks in {path.parent} ({error})"
            warnings.warn(f"{reason}: processes that start together repeat the work", stacklevel=3)
        yield

"""Write files and folders so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Hand out a temporary path beside `path`; on success it takes the name `path`.

    The temporary name keeps the suffix of `path`, since writers choose a format by it. The parent
    folder is made if it is missing. If the block raises, or writes nothing, `path` stays as it was
    and the temporary file is removed.

    Raises:
        FileNotFoundError: the block ended without having written the temporary file.
        IsADirectoryError: `path` is a folder.
        OSError: the folder cannot be made or written to.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder, expected a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own the file gets the permissions of the umask; mkstemp would give 0600.
    with _temporary_folder(target) as folder:
        temporary = folder / f"new{target.suffix}"
        yield temporary
        _open_to_others(temporary, folder)
        _sync_file(temporary)
        os.replace(temporary, target)
    _sync_folder(target.parent)


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Hand out a temporary folder beside `path`; on success it takes the name `path`.

    A folder that already has that name is moved aside first and deleted last: two renames, so a
    crash between them leaves the old content under a name that begins with `.{name}.`, not lost.
    If the block raises, `path` stays as it was and the temporary folder is removed.

    Raises:
        NotADirectoryError: `path` is a file.
        OSError: the parent cannot be made or written to.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, expected a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(target) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        publish_folder(new, target, aside=folder / "old")


def publish_folder(new: Path, target: Path, aside: Path) -> None:
    """Give a finished folder its name, once what is in it is on the disk.

    For writers that share `new` and need its name before it is whole. aside: where a folder that
    has the name now is put, for the caller to delete.
    """
    for file in new.rglob("*"):
        if file.is_file():
            _open_to_others(file, target.parent)
            _sync_file(file)
    if target.exists():
        os.replace(target, aside)
        try:
            os.replace(new, target)
        except BaseException:
            os.replace(aside, target)
            raise
    else:
        os.replace(new, target)
    _sync_folder(target.parent)


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_to_others(path: Path, folder: Path) -> None:
    """Give a file that its writer kept private (safetensors makes 0600) what the umask admits."""
    if path.exists() and path.stat().st_mode & 0o077 == 0:
        probe = folder / "umask"
        probe.touch()
        path.chmod(probe.stat().st_mode)
        probe.unlink()


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename durable, where the system lets one open a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)

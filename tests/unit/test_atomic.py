"""Old content or new, never half of it, and no temporary files left behind."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from aad1.atomic import replace_file, replace_folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_new_file_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a.txt"
    with replace_file(target) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["a.txt"]


def test_old_file_stays_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replace_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), replace_file(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"), replace_file(tmp_path / "a"):
        pytest.fail("the block must not run")


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_file_and_folder_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with replace_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
        with replace_file(tmp_path / "private.bin") as temporary:
            temporary.touch(0o600)  # as safetensors does
        with replace_folder(tmp_path / "b") as folder:
            (folder / "private.bin").touch(0o600)
    finally:
        os.umask(old)
    for name in ("a.txt", "private.bin", "b/private.bin"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with replace_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new.txt").write_text("new")
        assert names(target) == ["old.txt"]
    assert names(target) == ["sub"]
    assert (target / "sub" / "new.txt").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), replace_folder(target) as temporary:
        (temporary / "new.txt").write_text("half")
        raise RuntimeError
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["model"]


def test_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename, calls = os.replace, []

    def fails_the_second_time(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk full")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", fails_the_second_time)
    with pytest.raises(OSError, match="disk full"), replace_folder(target):
        pass
    assert names(target) == ["old.txt"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(NotADirectoryError, match="is a file"), replace_folder(tmp_path / "a"):
        pytest.fail("the block must not run")

"""Maps found in a WAD made here."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from aad1.errors import UserError
from aad1.worlds.doom.wads import read_map, wad_of

LUMPS = ("THINGS", "LINEDEFS", "SIDEDEFS", "VERTEXES", "SEGS", "SSECTORS", "NODES", "SECTORS",
         "REJECT", "BLOCKMAP")  # fmt: skip


def _wad(path: Path) -> Path:
    """A WAD of two maps; a lump's content is its map and name."""
    lumps = [("PALETTE", b"colours")]
    for name in ("MAP01", "MAP02"):
        lumps += [(name, b""), *((lump, f"{name} {lump}".encode()) for lump in LUMPS)]
    body, directory = b"", b""
    for name, content in lumps:
        directory += struct.pack("<ii8s", 12 + len(body), len(content), name.encode())
        body += content
    path.write_bytes(struct.pack("<4sii", b"IWAD", len(lumps), 12 + len(body)) + body + directory)
    return path


@pytest.mark.parametrize("name", ["MAP01", "MAP02"])
def test_a_map_is_read_alone(tmp_path: Path, name: str) -> None:
    found = read_map(_wad(tmp_path / "two.wad"), name)
    assert found == {lump: f"{name} {lump}".encode() for lump in LUMPS}


def test_a_map_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'MAP03' is not in two\.wad"):
        read_map(_wad(tmp_path / "two.wad"), "MAP03")


def test_maps_belong_to_the_two_phases() -> None:
    assert wad_of("MAP32") == "freedoom2.wad"
    assert wad_of("E4M9") == "freedoom1.wad"

"""Freedoom's maps as files: the WADs that ViZDoom brings."""

from __future__ import annotations

import mmap
import re
import struct
from importlib import import_module
from pathlib import Path
from typing import Any

from aad1.errors import UserError


def vizdoom() -> Any:
    """The module. Raises UserError that says what to install if it is missing."""
    try:
        return import_module("vizdoom")
    except ImportError as error:
        raise UserError(f"the doom world needs ViZDoom ({error}): pip install aad1[doom]") from None


def wad_of(map_name: str) -> str:
    """File name of the WAD that holds a map. Raises UserError for a name that no map has."""
    if re.fullmatch(r"MAP(0[1-9]|[12][0-9]|3[0-2])", map_name):
        return "freedoom2.wad"
    if re.fullmatch(r"E[1-4]M[1-9]", map_name):
        return "freedoom1.wad"
    raise UserError(f"doom map {map_name!r}: allowed are 'MAP01'..'MAP32' and 'E1M1'..'E4M9'")


def wad_path(wad: str) -> Path:
    """Where a WAD of ViZDoom's lies."""
    return Path(str(vizdoom().__path__[0])) / wad


def read_map(wad: Path, name: str) -> dict[str, bytes]:
    """The lumps of a map, THINGS to BLOCKMAP: those that follow the marker `name` in a WAD.

    Raises UserError if the WAD has no such map.
    """
    with wad.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count, directory = struct.unpack_from("<ii", data, 4)
        entries = [struct.unpack_from("<ii8s", data, directory + 16 * i) for i in range(count)]
        names = [entry[2].rstrip(b"\0").decode("ascii", "replace") for entry in entries]
        if name not in names:
            raise UserError(f"doom map {name!r} is not in {wad.name}")
        first = names.index(name) + 1
        return {
            names[i]: data[entries[i][0] : entries[i][0] + entries[i][1]]
            for i in range(first, min(first + 10, count))
        }

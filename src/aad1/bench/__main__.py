"""`python -m aad1.bench`: the same command where tyro and rich are not installed."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from aad1.bench.config import BenchConfig
from aad1.errors import UserError


def parse(argv: Sequence[str]) -> BenchConfig:
    """Flags are the fields of BenchConfig; `model` may be given without its name."""
    parser = argparse.ArgumentParser(prog="python -m aad1.bench", description=BenchConfig.__doc__)
    kinds = typing.get_type_hints(BenchConfig)
    for f in fields(BenchConfig):
        flag = "--" + f.name.replace("_", "-")
        if f.name == "model":
            parser.add_argument("model", nargs="?", default=f.default)
        elif kinds[f.name] is bool:
            parser.add_argument(flag, action="store_true")
        else:
            kind = Path if f.name == "json" else kinds[f.name]
            parser.add_argument(flag, type=kind, default=f.default)
    return BenchConfig(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user's mistake."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch is loaded; see aad1.cli
    from aad1.bench.run import bench

    try:
        bench(parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"aad1: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

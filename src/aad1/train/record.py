"""config.yaml: the record of a run, and the way to run it again."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from aad1.atomic import replace_file
from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.model_info import current_fields
from aad1.train.config import Experiment


def to_plain(value: Any) -> Any:
    """Dataclasses -> mappings with a `type` entry, tuples -> lists, paths -> strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """The inverse of `to_plain` for a value of the annotated type `kind`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        named = [o for o in options if dataclasses.is_dataclass(o) and isinstance(o, type)]
        if named and isinstance(value, dict):
            for option in named:
                if option.__name__ == value.get("type"):
                    return from_plain(option, value, where)
            names = ", ".join(o.__name__ for o in named)
            raise UserError(f"{where}.type must be one of {names}, got {value.get('type')!r}")
        return from_plain(next(o for o in options if o is not type(None)), value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping, got {value!r}")
        hints = typing.get_type_hints(kind)
        given = {k: v for k, v in value.items() if k != "type"}
        if kind is ChunkGeometry:
            given = current_fields(given, where)
        unknown = sorted(given.keys() - hints.keys())
        if unknown:
            raise UserError(f"{where} has no field {unknown[0]!r}; it has {', '.join(hints)}")
        for f in dataclasses.fields(kind):
            fallback = (f.default, f.default_factory)
            if f.name not in given and fallback == (dataclasses.MISSING, dataclasses.MISSING):
                raise UserError(f"{where} needs the field {f.name!r}")
        return kind(**{k: from_plain(hints[k], v, f"{where}.{k}") for k, v in given.items()})
    if origin is tuple:
        args = typing.get_args(kind)
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, got {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(value) != len(inner):
            raise UserError(f"{where} must be a list of {len(inner)}, got {value!r}")
        return tuple(from_plain(a, v, where) for a, v in zip(inner, value, strict=True))
    if kind is Path:
        if not isinstance(value, str):
            raise UserError(f"{where} must be a path, got {value!r}")
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and not isinstance(value, kind):
        raise UserError(f"{where} must be {kind.__name__}, got {value!r}")
    return value


def write_record(experiment: Experiment, path: Path) -> None:
    """Write the resolved config of a run."""
    with replace_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(to_plain(experiment), sort_keys=False))


def read_record(path: Path) -> Experiment:
    """The experiment of a config.yaml; UserError names the wrong field."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; a run's record is out/<run>/config.yaml")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as YAML: {line}") from None
    result = from_plain(Experiment, value, path.name)
    assert isinstance(result, Experiment)
    return result

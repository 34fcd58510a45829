"""The messages of the websocket: what a client may say, and how frames are packed.

A text message is a JSON object with a "type". A binary message is a JSON object too, with bytes
after it: two bytes (big-endian) give the length of the JSON, then the JSON, then the payload. The
server sends frames that way, and a client sends `start` with a picture. docs/serving.md lists all.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from aad1.errors import UserError

Code = Literal[
    "bad_message",  # not JSON, or no object, or a field is missing, unknown or of a wrong type
    "bad_value",  # a value out of range
    "bad_image",  # no picture, damaged, or of a format that is not taken
    "too_large",  # more bytes or pixels than allowed
    "rate_limited",  # too many messages or pictures in a short time
    "busy",  # all sessions are taken
    "not_ready",  # the model is still warming up
    "not_started",  # a command that needs a running video
    "view_only",  # a viewer of somebody else's session sent a command
    "no_session",  # the session to be viewed does not exist
    "recording_failed",
    "internal",  # a fault of the server
]
CODES: tuple[str, ...] = get_args(Code)
MAX_PROMPT = 2000
MAX_SEED = 2**53 - 1
"""The largest whole number that JavaScript holds exactly."""
HEADER_LIMIT = 16384


class ProtocolError(UserError):
    """An answer to a client's mistake: one line and a code to act on."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code

    def message(self, id: int | None = None) -> dict[str, Any]:  # noqa: A002 - the field's name
        """As it goes over the wire."""
        answer: dict[str, Any] = {"type": "error", "code": self.code, "message": str(self)}
        return answer if id is None else answer | {"id": id}


def typed(error: Exception) -> ProtocolError:
    """What a client is told of any exception; what is no mistake of its own goes to stderr."""
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, UserError):
        return ProtocolError("bad_value", str(error))
    told = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"aad1: a request failed: {told}", file=sys.stderr)
    return ProtocolError("internal", f"the server failed ({type(error).__name__})")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a client may send. id: any whole number, which the answer repeats."""

    type: ClassVar[str]
    id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Start(Command):
    """Begin a video: with a sample's name, a picture (the payload), or neither (text to video)."""

    type = "start"
    prompt: str = ""
    seed: int = 0
    sample: str | None = None
    image: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Prompt(Command):
    """Steer; blend: chunks over which the old prompt fades out."""

    type = "prompt"
    prompt: str
    blend: int = 1


@dataclass(frozen=True, kw_only=True)
class Pause(Command):
    type = "pause"


@dataclass(frozen=True, kw_only=True)
class Resume(Command):
    type = "resume"


@dataclass(frozen=True, kw_only=True)
class Reset(Command):
    """Back to the picture, with the prompt in force; seed: another one, or the same."""

    type = "reset"
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stop(Command):
    type = "stop"


@dataclass(frozen=True, kw_only=True)
class Record(Command):
    """Begin (on) or finish a recording of what is shown."""

    type = "record"
    on: bool


@dataclass(frozen=True, kw_only=True)
class Ping(Command):
    type = "ping"


COMMANDS: dict[str, type[Command]] = {
    c.type: c for c in (Start, Prompt, Pause, Resume, Reset, Stop, Record, Ping)
}
_TYPES: dict[str, tuple[type, str]] = {
    "id": (int, "a whole number"),
    "prompt": (str, "a string"),
    "seed": (int, "a whole number"),
    "sample": (str, "a string"),
    "blend": (int, "a whole number"),
    "on": (bool, "true or false"),
}
_RANGES = {"id": (0, MAX_SEED), "seed": (0, MAX_SEED), "blend": (1, 64)}


def parse(message: str | bytes) -> Command:
    """One message of a client. ProtocolError says what is wrong with it."""
    if isinstance(message, bytes):
        raw, payload = unpack(message)
        if raw.get("type") != "start":
            raise ProtocolError("bad_message", "only start comes with bytes")
        if "sample" in raw:
            raise ProtocolError("bad_message", "start takes a sample or a picture, not both")
        if not payload:
            raise ProtocolError("bad_image", "the picture has 0 bytes")
    else:
        raw, payload = _object(message), b""
    kind = raw.pop("type", None)
    if not isinstance(kind, str) or kind not in COMMANDS:
        raise ProtocolError(
            "bad_message", f"unknown command {str(kind)[:40]!r}; known: {', '.join(COMMANDS)}"
        )
    command = COMMANDS[kind]
    known = {f.name for f in fields(command)} - {"image"}
    for name, value in raw.items():
        if name not in known:
            raise ProtocolError("bad_message", f"{kind} has no field {name[:40]!r}")
        _check(kind, name, value)
    if payload:
        raw["image"] = payload
    try:
        return command(**raw)
    except TypeError:
        missing = sorted(known - raw.keys() - {"id"})
        raise ProtocolError("bad_message", f"{kind} needs {', '.join(missing)}") from None


def _check(kind: str, name: str, value: Any) -> None:
    type_, words = _TYPES[name]
    if not isinstance(value, type_) or (type_ is int and isinstance(value, bool)):
        raise ProtocolError("bad_message", f"{kind}: {name} must be {words}")
    if isinstance(value, int) and name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise ProtocolError("bad_value", f"{kind}: {name} must be in {low}..{high}")
    if isinstance(value, str):
        if len(value) > MAX_PROMPT:
            raise ProtocolError(
                "bad_value", f"{kind}: {name} has {len(value)} characters, at most {MAX_PROMPT}"
            )
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
            raise ProtocolError("bad_value", f"{kind}: {name} is not valid Unicode")


def _object(text: str) -> dict[str, Any]:
    if len(text) > HEADER_LIMIT:
        raise ProtocolError(
            "too_large", f"a message of {len(text)} characters, at most {HEADER_LIMIT}"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("bad_message", "the message is not JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError(
            "bad_message", f"a message must be an object, got {type(value).__name__}"
        )
    return value


def pack(header: Mapping[str, Any], payload: bytes) -> bytes:
    """A binary message."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack(">H", len(text)) + text + payload


def unpack(message: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and payload of a binary message. ProtocolError if it is none."""
    if len(message) < 2:
        raise ProtocolError(
            "bad_message", f"a binary message of {len(message)} bytes has no header"
        )
    (length,) = struct.unpack_from(">H", message)
    if len(message) < 2 + length:
        raise ProtocolError(
            "bad_message", f"a header of {length} bytes in a message of {len(message)}"
        )
    try:
        text = message[2 : 2 + length].decode()
    except UnicodeDecodeError:
        raise ProtocolError("bad_message", "the header is not UTF-8") from None
    return _object(text), message[2 + length :]

"""Messages: what is understood, and that anything else gets a typed answer."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aad1.serve import protocol
from aad1.serve.protocol import CODES, Command, ProtocolError, pack, parse, unpack


def test_commands_are_understood() -> None:
    assert parse('{"type": "start", "prompt": "a", "seed": 3, "sample": "00.png", "id": 1}') == (
        protocol.Start(prompt="a", seed=3, sample="00.png", id=1)
    )
    assert parse('{"type": "prompt", "prompt": "b", "blend": 2}') == (
        protocol.Prompt(prompt="b", blend=2)
    )
    assert parse('{"type": "record", "on": true}') == protocol.Record(on=True)
    for name in ("pause", "resume", "reset", "stop", "ping"):
        assert parse(json.dumps({"type": name})).type == name
    start = parse(pack({"type": "start", "prompt": "a"}, b"picture"))
    assert start == protocol.Start(prompt="a", image=b"picture")


def test_pack_and_unpack_are_inverse() -> None:
    header, payload = {"type": "frame", "number": 3}, bytes(range(256))
    message = pack(header, payload)
    assert unpack(message) == (header, payload)
    (length,) = struct.unpack(">H", message[:2])  # the layout that the page reads
    assert json.loads(message[2 : 2 + length]) == header


BAD: list[tuple[str | bytes, str, str]] = [
    ("", "bad_message", "JSON"),
    ("{", "bad_message", "JSON"),
    ("[" * 10000, "bad_message", "JSON"),
    ("9" * 10000, "bad_message", "JSON"),
    ("[]", "bad_message", "object, got list"),
    ("null", "bad_message", "object"),
    ("{}", "bad_message", "unknown command 'None'"),
    ('{"type": "fly"}', "bad_message", "unknown command 'fly'"),
    ('{"type": ["start"]}', "bad_message", "unknown command"),
    ('{"type": "prompt"}', "bad_message", "needs blend, prompt"),
    ('{"type": "prompt", "prompt": 3}', "bad_message", "prompt must be a string"),
    ('{"type": "prompt", "prompt": "a", "blend": 0}', "bad_value", "blend must be in 1..64"),
    ('{"type": "prompt", "prompt": "a", "blend": true}', "bad_message", "a whole number"),
    ('{"type": "prompt", "prompt": "\\ud800"}', "bad_value", "Unicode"),
    ('{"type": "start", "seed": -1}', "bad_value", "seed must be in 0.."),
    ('{"type": "start", "seed": 1.5}', "bad_message", "seed must be a whole number"),
    ('{"type": "start", "seed": NaN}', "bad_message", "seed must be a whole number"),
    ('{"type": "start", "file": "/etc/passwd"}', "bad_message", "no field 'file'"),
    ('{"type": "start", "image": "x"}', "bad_message", "no field 'image'"),
    ('{"type": "record", "on": 1}', "bad_message", "true or false"),
    (json.dumps({"type": "prompt", "prompt": "a" * 2001}), "bad_value", "2001 characters"),
    ("x" * 20000, "too_large", "20000 characters"),
    (b"", "bad_message", "no header"),
    (b"\xff\xff{}", "bad_message", "header of 65535 bytes"),
    (b"\x00\x02\xff\xfe", "bad_message", "not UTF-8"),
    (b"\x00\x02{}picture", "bad_message", "only start"),
    (pack({"type": "start"}, b""), "bad_image", "0 bytes"),
    (pack({"type": "start", "sample": "00.png"}, b"x"), "bad_message", "not both"),
]


@pytest.mark.parametrize("message, code, words", BAD)
def test_each_mistake_has_a_code_and_one_line(message: str | bytes, code: str, words: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(message)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@settings(max_examples=200, deadline=None)
@given(
    st.text() | st.binary() | st.dictionaries(
        st.sampled_from(["type", "prompt", "seed", "blend", "on", "id", "sample"]),
        st.sampled_from([*protocol.COMMANDS]) | st.integers() | st.text() | st.booleans()
        | st.none() | st.floats() | st.lists(st.integers()),
    ).map(json.dumps)
)  # fmt: skip
def test_anything_is_a_command_or_a_typed_error(message: str | bytes) -> None:
    try:
        command = parse(message)
    except ProtocolError as error:
        code = error.code
    else:
        assert isinstance(command, Command)
        return
    assert code in CODES

"""Layouts of processes, and what is refused."""

from __future__ import annotations

import pytest

from aad1.errors import UserError
from aad1.parallel.mesh import MeshShape, Processes, check_heads, share, split_evenly


@pytest.mark.parametrize(
    "text,size,want",
    [
        ("", 1, (1, 1, 1)),
        ("", 8, (8, 1, 1)),
        ("cp=2", 8, (4, 2, 1)),
        ("dp=2", 8, (2, 4, 1)),
        ("dp=4, cp=2, replicas=2", 8, (4, 2, 2)),
    ],
)
def test_layouts(text: str, size: int, want: tuple[int, int, int]) -> None:
    shape = MeshShape.parse(text, size)
    assert (shape.dp, shape.cp, shape.replicas) == want


@pytest.mark.parametrize(
    "text,size,message",
    [
        ("dp=3", 4, "dp=3,cp=1 needs 3 processes, there are 4"),
        ("cp=3", 4, "dp=1,cp=3 needs 3 processes, there are 4"),
        ("dp=0", 4, "dp=0,cp=1 needs 0 processes"),
        ("dp=2,cp=2,replicas=3", 4, "replicas=3 does not divide 4"),
        ("dp=2,cp", 4, "must be like dp=4,cp=2"),
        ("tp=2", 2, "must be like dp=4,cp=2"),
        ("dp=2,dp=2", 4, "must be like dp=4,cp=2"),
    ],
)
def test_impossible_layouts_are_refused(text: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        MeshShape.parse(text, size)
    assert "\n" not in str(error.value)


def test_cp_must_divide_all_heads_and_the_list_says_what_does() -> None:
    check_heads(4, {"generator": 12, "discriminator": 40})
    check_heads(8, {"generator": 40, "discriminator": 40})
    message = r"cp=8 must divide .*\(generator 12, discriminator 40\): 1, 2, 4$"
    with pytest.raises(UserError, match=message):
        check_heads(8, {"generator": 12, "discriminator": 40})


@pytest.mark.parametrize(
    "total,most,dp,want", [(64, 1, 8, (8, 1)), (32, 32, 2, (16, 16)), (12, 4, 2, (6, 3))]
)
def test_batches_are_shared_out(total: int, most: int, dp: int, want: tuple[int, int]) -> None:
    assert share(total, most, dp) == want


def test_a_batch_that_does_not_come_out_even_is_refused() -> None:
    with pytest.raises(UserError, match="dp=5 does not divide the batch of 64"):
        share(64, 1, 5)


def test_lists_are_split_into_parts_of_equal_length() -> None:
    parts = [list(split_evenly(7, 3, i)) for i in range(3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]


def test_one_process_agrees_with_itself() -> None:
    alone = Processes()
    assert alone.main and not alone.any(False) and alone.any(True)
    assert alone.gather(3) == [3]
    with pytest.raises(UserError, match="^no$") as error, alone.together():
        raise UserError("no")
    assert type(error.value) is UserError

"""Signals, locks and changed settings."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from aad1.errors import UserError
from aad1.train.guard import StopFlag, changes, only_run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_a_second_one_ends(number: int) -> None:
    before = signal.getsignal(number)
    with StopFlag().listening() as flag:
        assert flag.name == ""
        os.kill(os.getpid(), number)
        assert flag.name == signal.Signals(number).name
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        only_run(tmp_path),
        pytest.raises(UserError, match=rf"by another run \(process {os.getpid()} on "),
        only_run(tmp_path),
    ):
        pass
    with only_run(tmp_path):  # free again
        pass


def test_changes_name_the_field_with_both_values() -> None:
    old = {"seed": 1, "optim": {"lr": 1e-4, "updates": 5}, "mesh": "", "sigmas": [1.0]}
    new = {"seed": 1, "optim": {"lr": 2e-4, "updates": 9}, "mesh": "dp=2", "max": 3}
    assert changes(old, old) == []
    assert changes(old, new) == [
        "optim.lr: 0.0001 -> 0.0002", "sigmas: [1.0] -> absent", "max: absent -> 3",
    ]  # fmt: skip

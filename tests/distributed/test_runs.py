"""Runs in several processes: resumed, interrupted, killed, and told what cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import JOBS, aad1, environment, finish, free_port, launch

from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig
from aad1.presets import preset
from aad1.train import checkpoint
from aad1.train.config import MonitorConfig
from aad1.train.record import write_record
from aad1.train.run import Run

MODEL = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=2, text_dim=16,
    freq_dim=32, rope_theta=100.0, prediction="x0",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml of a tiny stage II, with its teacher trained."""
    out = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    for stage in ("teacher", "dmd"):
        e = preset(f"sprites-tiny-{stage}")
        e = replace(
            e, model=MODEL, out=out, device="cpu", log_every=1, checkpoint_every=1,
            discriminator=DiscriminatorConfig(taps=(0, 1)),
            optim=replace(e.optim, updates=2, batch=4, warmup=0, lr=1e-3),
            monitor=MonitorConfig(every=2, clips=3),
        )  # fmt: skip
        if stage == "teacher":
            teacher = Run(e).train()
    e = replace(e, teacher=teacher, init=teacher, stage=replace(e.stage, critic_updates=2))
    write_record(e, out / "config.yaml")
    return out / "config.yaml"


def test_resumed_at_any_step_a_sharded_run_equals_a_straight_one(tmp_path: Path) -> None:
    assert launch(2, "two_parts", folder=str(tmp_path)) == [[True] * 3] * 2


def test_2_then_1_then_2_processes_see_the_same_data_and_noise(tmp_path: Path) -> None:
    straight = launch(1, "part", folder="", until=6, straight=True)[0]
    asked: list[int] = []
    seeds: list[int] = []
    for size, until in ((2, 1), (1, 4), (2, 6)):
        results = launch(size, "part", folder=str(tmp_path), until=until, straight=False)
        asked += [n for result in results for n in result[0]]
        seeds += [n for result in results for n in result[1]]
    assert sorted(asked) == sorted(straight[0]) == list(range(24))
    assert set(seeds) == set(straight[1])
    for name, value in straight[2].items():
        torch.testing.assert_close(results[0][2][name], value, rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def found(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("faults")
    first, second = launch(2, "faults", config=str(config), out=str(out))
    assert first == second  # both processes end alike, whatever happens
    assert isinstance(first, dict)
    return first


def test_a_signal_to_one_process_saves_at_the_next_step_and_the_run_goes_on(
    found: dict[str, Any],
) -> None:
    said, kept = found["term"]
    assert said.startswith("Stopped: ") and "stopped by SIGTERM at update 0" in said
    assert kept == ["step-000000-02"]  # in the middle of the first update
    assert "stopped by SIGUSR1 at update 1" in found["usr1"][0]
    assert found["usr1"][1] == ["step-000001-02"]
    assert len(found["straight"]) == 64
    assert found["term, resumed"] == found["usr1, resumed"] == found["straight"]


def test_what_is_not_finite_in_one_process_stops_both(found: dict[str, Any]) -> None:
    said, kept = found["nan"]
    assert said == "NonFinite: update 1: critic fake is nan (samples 14 to 15) in process 1"
    assert kept == ["step-000001"]
    assert found["nan, skipped"] == (64, 6)


def test_a_full_disk_is_reported_and_the_old_checkpoint_kept(found: dict[str, Any]) -> None:
    said, kept = found["full"]
    assert "step-000002 could not be written" in said and "GiB free" in said
    assert said.endswith("step-000001 is kept")
    assert kept == ["step-000001"]
    assert found["full, resumed"] == found["straight"]


@pytest.mark.parametrize(
    "what,message",
    [
        ("changed", "optim.lr: 0.001 -> 0.5); give --accept-changes"),
        ("no mesh", "dp=3,cp=1 needs 3 processes, there are 2"),
        ("muon", "muon needs whole matrices, which are in parts in 2 processes: use one process"),
        ("no batch", "dp=2 does not divide the batch of 3"),
        ("locked", "is being written by another run (process "),
        ("truncated", "__1_0.distcp is truncated: 100 bytes of"),
    ],
)
def test_what_cannot_be_is_one_line_in_all_processes(
    found: dict[str, Any], what: str, message: str
) -> None:
    assert found[what].startswith("SharedError: ")
    assert message in found[what] and "\n" not in found[what]
    assert found["changed, told"] == 64


def test_a_process_killed_in_a_save_ends_the_run_and_leaves_the_last_checkpoint(
    config: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    arguments = json.dumps({"config": str(config), "out": str(tmp_path)})
    patience = ["--shutdown-timeout", "2"] if torch.__version__ >= "2.13" else []
    agent = torchrun(
        "--standalone", "--nproc-per-node", "2", *patience,
        str(JOBS), "dies", str(tmp_path), arguments,
    )  # fmt: skip
    ((code, text),) = finish([agent])
    assert time.monotonic() - began < 100
    assert code != 0 and "SIGKILL" in text
    run = tmp_path / "sprites-tiny-dmd"
    (kept,) = checkpoint.steps(run)
    assert kept.name == "step-000001"
    checkpoint.read_meta(kept)
    # ... and one process goes on from what two have saved
    ((code, text),) = finish(aad1(1, "train", str(config), "--out", str(tmp_path)))
    assert code == 0, text
    assert "continuing from" in text and "ended at the last update" in text


def test_all_processes_end_with_the_same_exit_code(config: Path, tmp_path: Path) -> None:
    """2 for a user's mistake, told once; 0 after a signal to one of them."""
    (first, said), (second, other) = finish(aad1(2, "train", str(config), "--mesh", "dp=3"))
    assert (first, second) == (2, 2)
    assert said == (
        "aad1: --mesh dp=3,cp=1 needs 3 processes, there are 2 (torchrun --nproc-per-node)\n"
    )
    assert other == ""
    started = aad1(
        2, "train", str(config), "--out", str(tmp_path), "--optim.updates", "1000",
        "--monitor.every", "0",
    )  # fmt: skip
    end = time.monotonic() + 90
    while not checkpoint.steps(tmp_path / "sprites-tiny-dmd") and time.monotonic() < end:
        time.sleep(0.2)
    os.kill(started[1].pid, signal.SIGTERM)
    results = finish(started, 60)
    assert [code for code, _ in results] == [0, 0], results
    assert "stopped by SIGTERM at update" in results[0][1]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_agents_of_torchrun_as_on_two_machines_and_a_signal_to_one(
    config: Path, tmp_path: Path
) -> None:
    port = str(free_port())
    agents = [
        torchrun(
            "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
            "--master-addr", "127.0.0.1", "--master-port", port,
            "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1",
            "-m", "aad1.cli", "train", str(config), "--out", str(tmp_path),
            "--optim.updates", "1000", "--monitor.every", "0",
        )
        for rank in range(2)
    ]  # fmt: skip
    run = tmp_path / "sprites-tiny-dmd"
    end = time.monotonic() + 90
    while not checkpoint.steps(run) and time.monotonic() < end:
        time.sleep(0.2)
    os.kill(agents[0].pid, signal.SIGUSR1)
    results = finish(agents, 60)
    said = "".join(text for _, text in results)
    assert "stopped by SIGUSR1 at update" in said, said
    (kept,) = checkpoint.steps(run)
    assert json.loads((kept / "meta.json").read_text())["processes"] == 2

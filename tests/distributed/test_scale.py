"""What large networks need: read straight into shards, as large in each process as was said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launch import launch

from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.weights import save_transformer

MODEL = WanConfig(
    num_attention_heads=4, attention_head_dim=128, ffn_dim=2048, num_layers=4, text_dim=64,
    freq_dim=32,
)  # fmt: skip
MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_network_is_read_into_shards_and_never_held_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WanTransformer(MODEL)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    save_transformer(model, tmp_path / "transformer", None, limit=10 * MIB)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3
    for found in launch(2, "loaded", path=str(tmp_path)):
        _, grew, size, largest = found.pop("whole")
        assert size > 60 * MIB > 10 * largest / 2 and grew > 0.95 * size  # the test can tell
        assert set(found) == {"fp32", "bf16", "discriminator"}
        for name, (equal, grew, mine, largest) in found.items():
            assert equal, name
            assert grew < mine + largest + 8 * MIB < 0.8 * size * (1 + (name[0] == "d")), name


def test_states_on_the_cpu_are_sharded_saved_and_loaded_alike(tmp_path: Path) -> None:
    for found in launch(2, "states_on_cpu", folder=str(tmp_path)):
        for apart, equal in found:
            assert equal and apart < 1e-6


def test_each_process_knows_its_rows() -> None:
    """Also where they do not come out even, and with replicas."""
    for found in launch(4, "rows", meshes=["dp=4", "dp=4,replicas=2"]):
        assert len(found) == 2 * 13
        for start, stop, torch_start, torch_stop, count in found:
            assert stop - start == count == torch_stop - torch_start
            assert start == torch_start or not count


def test_64_processes_hold_what_the_dry_run_says() -> None:
    """Networks of full size, sharded by FSDP2 on the mesh of 64 processes of which one is there."""
    (found,) = launch(1, "dry", size=64)
    assert len(found) == 5
    for name, rank, held, told, shards, said in found:
        assert shards == 64 and set(held) <= set(told)
        for role, kinds in held.items():
            line = next(x for x in said.splitlines() if x.startswith(role) and " G " in x)
            for kind, size in kinds.items():
                want = getattr(told[role], kind) / shards
                if kind == "adam":  # the dry run leaves out what has no gradient
                    assert size >= 0.99 * want
                    continue
                # Tables of one row are whole in the first process and empty in the others.
                assert abs(size - want) < 0.015 * want + 2 * MIB, (name, rank, role, kind)
                column = {"weights": 0, "average": 3}[kind]
                printed = float(line.split(" G ")[1].split()[column])
                assert printed == pytest.approx(size / 2**30, abs=0.011), (name, rank, role)


def test_a_step_of_stage_three_runs_in_one_of_64_processes() -> None:
    """Both steps at 14B's width under FSDP2, cp=8 and checkpointing, without numbers."""
    ((found, told),) = launch(1, "step", size=64)
    assert set(found) == {"critic", "generator"}
    for role, size in found.items():
        assert size == pytest.approx(told[role] / 64, rel=0.01), role

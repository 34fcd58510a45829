"""runs/train_speed.py on the CPU at a tiny scale: it must run where it is needed, on a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aad1.core.chunks import ChunkGeometry
from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig
from aad1.presets import preset
from aad1.train.config import Experiment, WanData
from aad1.train.log import SilentLog
from aad1.train.plan import Cluster, plan
from aad1.train.run import Run

FILE = Path(__file__).parents[3] / "runs" / "train_speed.py"
MODEL = WanConfig(
    num_attention_heads=2, attention_head_dim=8, ffn_dim=32, num_layers=2, text_dim=8, freq_dim=16
)


@pytest.fixture(scope="module")
def program() -> ModuleType:
    sys.path.insert(0, str(FILE.parent))
    spec = importlib.util.spec_from_file_location("train_speed", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_speed"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def tiny(name: str) -> Experiment:
    """A preset of any world, at a size that a CPU takes in its stride."""
    e = preset(name)
    if name.startswith("evidence"):
        return e
    if isinstance(e.data, WanData):
        e = replace(e, data=replace(e.data, width=32, height=32, frames=9))
    return replace(
        e, model=MODEL, text_length=4, geometry=ChunkGeometry(chunk=4, sink=1, window=9),
        discriminator=DiscriminatorConfig(taps=(0, 1)), optim=replace(e.optim, batch=1),
    )  # fmt: skip


@pytest.fixture
def small(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "preset", tiny)
    monkeypatch.setattr(sys.modules["random_run"], "DOOM_CLIP", (16, 9, 4, 4))


def run(program: ModuleType, path: Path, *arguments: str) -> dict[str, Any]:
    common = ["--device", "cpu", "--updates", "1", "--json", str(path)]
    assert program.main([*arguments, *common]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


STUDENT = {"data", "rollout", "generator: judged", "generator: forward", "generator: backward",
           "critic: forward", "critic: backward", "optimizer", "average", "rest"}  # fmt: skip
ALONE = {"data", "generator: forward", "generator: backward", "optimizer", "average", "rest"}


@pytest.mark.parametrize(
    "name,phases",
    [
        ("evidence-tiny-teacher", ALONE),
        ("evidence-tiny-ode", ALONE),
        ("doom-dmd", STUDENT),
        ("wan1.3b-aad", STUDENT),
    ],
)
@pytest.mark.usefixtures("small")
def test_the_phases_of_an_update_make_it_up(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
    phases: set[str],
) -> None:  # fmt: skip
    variants = ["plain", "fused"] if name.startswith("evidence") else ["fused"]
    found = run(program, tmp_path / "speed.json", name, "--variants", *variants)
    assert list(found["variants"]) == variants
    for row in found["variants"].values():
        assert set(row["phases"]) == phases
        total = sum(device for device, _ in row["phases"].values())
        assert total == pytest.approx(row["update_ms"], rel=0.02)
        assert all(ms > 0 for ms, _ in row["phases"].values())
        assert set(row["flops"]) <= phases and row["tflops"] > 0
        assert row["counts"]["kernels"] > 100 and row["top"][0][2] > 0
        assert row["tokens"] % row["clips"] == 0 and row["peak_gib"] is None
    said = capsys.readouterr().out
    assert "tokens/s" in said and "most time in:" in said


@pytest.mark.parametrize(
    "name",
    ["evidence-tiny-teacher", "evidence-tiny-ode", "evidence-tiny-dmd", "evidence-tiny-aad",
     "evidence-tiny-joint", "doom-dmd", "wan1.3b-aad"],
)  # fmt: skip
@pytest.mark.usefixtures("small")
def test_the_arithmetic_is_what_torch_counts(program: ModuleType, name: str) -> None:
    e = tiny(name)
    e = replace(e, optim=replace(e.optim, accumulate=1), device="cpu")
    made = Run(e, program.RandomSetup)
    t = made.trainer(SilentLog(e.folder, e.name, 1))
    t.critic_warmup = 0
    with t.reader, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        t.step()
    want = float(counter.get_total_flops())
    # Less than formulas say: nobody asks for the gradient of what a network is given, and of
    # checkpointed networks the blocks alone run again, not the embeddings (which weigh, so small).
    told = sum(program.arithmetic(e, made.setup).values())
    assert (0.9 if e.checkpoint_blocks else 0.94) * told < want < told


def test_a_dry_run_counts_the_same(program: ModuleType) -> None:
    """... for a whole update, critic steps included."""
    for name in ("wan1.3b-ode", "wan1.3b-dmd", "wan1.3b-aad"):
        e = tiny(name)
        with torch.device("meta"):
            made = program.RandomSetup(e, program.Run(e, _Nothing).processes, torch.device("cpu"))
        assert sum(program.arithmetic(e, made).values()) == pytest.approx(plan(e, Cluster()).work)


class _Nothing:
    def __init__(self, e: Experiment, processes: Any, device: torch.device) -> None:
        self.processes = processes


def test_a_variant_that_fails_does_not_take_the_others_along(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken() -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(program, "compile_blocks", broken)
    variants = ["--variants", "compiled", "fused"]
    found = run(program, tmp_path / "speed.json", "evidence-tiny-ode", *variants)
    assert list(found["variants"]) == ["fused"]
    assert "compiled: RuntimeError: no compiler\n" in capsys.readouterr().out


def test_it_needs_no_more_than_it_says(tmp_path: Path) -> None:
    """Not what records doom, writes videos, reads other formats or draws on a terminal."""
    code = (
        "import os, runpy, sys\n"
        "for name in ('vizdoom', 'diffusers', 'transformers', 'av', 'tyro', 'rich', 'tensorboard',"
        " 'huggingface_hub', 'scipy', 'aiohttp'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"  # as python itself does
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(FILE), "evidence-tiny-aad", "--device", "cpu",
         "--updates", "1", "--variants", "plain"],
        text=True, capture_output=True, timeout=200, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["evidence-tiny-aadd"], "did you mean 'evidence-tiny-aad'"),
        (["evidence-tiny-aad", "--updates", "0"], "--updates, --warm-up and --micro-steps must be"),
        (["evidence-tiny-aad", "--batch", "0"], "optim.batch must be at least 1, got 0"),
    ],
)
def test_mistakes_are_told_in_one_line(
    program: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert program.main([*arguments, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1

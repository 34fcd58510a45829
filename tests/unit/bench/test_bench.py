"""`aad1 bench` on the tiny model: what it measures, says, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aad1.bench import kernels
from aad1.bench.__main__ import main, parse
from aad1.bench.config import BenchConfig
from aad1.bench.measure import PlainVideo, _statistics
from aad1.bench.run import bench
from aad1.cli import main as cli
from aad1.errors import UserError

SMALL = dict(model="tiny", size="32x32", chunks=2, device="cpu")


def test_figures_add_up_and_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    config = BenchConfig(**SMALL, baseline=True, merged=True, json=path)  # type: ignore[arg-type]
    out = bench(config)
    assert json.loads(path.read_text())["results"] == out["results"]
    assert list(out["results"]) == ["baseline", "fast", "merged"]
    assert out["results"]["baseline"]["difference"] == 0
    for name in ("fast", "merged"):
        assert 0 < out["results"][name]["difference"] < 1e-5
    fast = out["results"]["fast"]
    stages = fast["stages"]
    assert set(stages) == {
        "image encode", "prefill", "generate pass", "cache pass", "decode", "hand-over", "chunk"
    }  # fmt: skip
    parts = ("generate pass", "cache pass", "decode", "hand-over")
    assert sum(stages[p]["median"] for p in parts) == pytest.approx(
        stages["chunk"]["median"], rel=0.5
    )
    assert all(0 <= s["median"] <= s["p90"] for s in stages.values())
    assert fast["dit_fps"] == pytest.approx(16_000 / fast["dit_ms"])
    assert fast["fps"] == pytest.approx(16_000 / stages["chunk"]["median"])
    assert fast["fps"] < fast["dit_fps"]
    text = capsys.readouterr().out
    for word in ("text encoder left out", "first pixels", "peak memory", "baseline", "window 9"):
        assert word in text


def test_each_part_is_turned_off_by_itself() -> None:
    config = BenchConfig(**SMALL, ablate=True, no_decode=True, add="fp8")  # type: ignore[arg-type]
    out = bench(config)
    assert list(out["results"]) == ["fast", "without precompute", "without fp8"]
    assert out["results"]["without precompute"]["difference"] < 1e-6
    assert out["results"]["without fp8"]["difference"] > 1e-3  # what float8 costs is visible
    assert "decode" not in out["results"]["fast"]["stages"]


def test_a_slower_stage_is_seen_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted delay must show in its stage and in the whole, and nowhere else."""
    import time

    commit = PlainVideo.commit

    def slow(self: PlainVideo, x0: torch.Tensor, text: torch.Tensor) -> None:
        time.sleep(0.3)
        commit(self, x0, text)

    monkeypatch.setattr(PlainVideo, "commit", slow)
    out = bench(BenchConfig(**SMALL, baseline=True, no_decode=True))  # type: ignore[arg-type]
    stages = out["results"]["baseline"]["stages"]
    assert stages["cache pass"]["median"] > 300 > stages["generate pass"]["median"]
    assert stages["chunk"]["median"] > 300
    assert out["results"]["fast"]["stages"]["cache pass"]["median"] < 300


def test_a_tiny_decoder_takes_the_place_of_wans_own(tmp_path: Path) -> None:
    from aad1.models.tiny_decoder import TinyDecoder

    torch.save(TinyDecoder((8, 8, 8, 8)).state_dict(), tmp_path / "tiny.pth")
    config = BenchConfig(**SMALL, baseline=True, decoder=str(tmp_path / "tiny.pth"))  # type: ignore[arg-type]
    out = bench(config)
    assert "decode" in out["results"]["fast"]["stages"]
    assert any("tiny decoder" in note for note in out["notes"])
    random = bench(BenchConfig(**SMALL, decoder="random", dtype="bfloat16"))  # type: ignore[arg-type]
    assert "tiny decoder, random, 9.8M parameters" in random["notes"]
    assert "decode_error" not in random  # random weights decode something else
    with pytest.raises(UserError, match="does not exist"):
        bench(BenchConfig(**SMALL, decoder="nowhere.pth"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a tiny decoder is for Wan 2.1's latents"):
        bench(BenchConfig(model="sprites", chunks=1, device="cpu", decoder="random"))


def test_statistics_are_nearest_ranks() -> None:
    assert _statistics([float(i) for i in range(11)]) == {"median": 5.0, "p90": 9.0}


@pytest.mark.parametrize(
    "given,message",
    [
        (dict(size="100x48"), "width 100 must be a multiple of 16"),
        (dict(size="wide"), "size must be WIDTHxHEIGHT such as 832x480, got 'wide'"),
        (dict(chunks=0), "chunks must be at least 1, got 0"),
        (dict(device="tpu"), "device must be auto, cpu or cuda, got 'tpu'"),
        (dict(dtype="int8"), "got 'int8'"),
        (dict(without="speed"), "no part 'speed' of the fast path; known: precompute, compile"),
        (dict(add="magic"), "no part 'magic'"),
        (dict(window=3), "window must be at least sink . chunk = 5 frames, got 3"),
        (dict(steps=3), "steps must be one of 1, 2, 4, got 3"),
        (dict(model="1.3bb"), "no model '1.3bb'"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench(BenchConfig(**(SMALL | given)))  # type: ignore[arg-type]


def test_both_entries_take_the_same_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--size", "32x32", "--chunks", "2", "--no-decode", "--without", "precompute"]
    assert parse(["1.3b", *flags]) == BenchConfig(
        model="1.3b", size="32x32", chunks=2, no_decode=True, without="precompute"
    )
    assert cli(["bench", "--model", "tiny", "--device", "cpu", *flags]) == 0
    assert "generate pass" in capsys.readouterr().out
    assert main(["tiny", "--chunks", "0"]) == 2
    assert capsys.readouterr().err == "aad1: chunks must be at least 1, got 0\n"


def test_it_runs_without_the_libraries_of_the_command_line() -> None:
    """A rented GPU machine may have PyTorch and little else."""
    code = """
import sys
for name in ("diffusers", "transformers", "av", "tyro", "rich", "huggingface_hub", "yaml"):
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if sys.modules.get(n, 0) is None else find(n, *a)
from aad1.bench.__main__ import main
sys.exit(main(["tiny", "--size", "32x32", "--chunks", "1", "--baseline", "--device", "cpu"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "diffusers is not installed: the plain decode is this package's" in done.stdout
    assert "end to end, frames/s" in done.stdout


def test_kernels_are_summed_by_kind_and_gaps_are_what_lies_between() -> None:
    found = kernels.summed(
        [
            ("cudnn_generated_native_sdpa_sm90_flash_fprop", 0.0, 4000.0),
            ("sm90_xmma_fprop_implicit_gemm_bf16", 5000.0, 6000.0),
            ("nvjet_sm90_tst_192x128", 6000.0, 9000.0),
            ("nvjet_sm90_tst_192x128", 8500.0, 9500.0),  # beside the one before
            ("triton_poi_fused_add_convolution", 10000.0, 10500.0),
        ]
    )
    assert found["kinds"] == {
        "attention": 4.0, "convolutions": 1.0, "matrix products": 4.0, "everything else": 0.5,
    }  # fmt: skip
    assert found["whole"] == 10.5 and found["gaps"] == 1.5 and found["kernels"] == 5
    assert found["top"][0][1:] == [4.0, 1] and found["top"][1] == ["nvjet_sm90_tst_192x128", 4.0, 2]
    assert kernels.summed([])["whole"] == 0


def test_a_profile_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="the device is cpu"):
        bench(BenchConfig(profile=True, device="cpu"))


@pytest.mark.gpu
def test_a_profile_on_cuda_tells_of_passes_and_decode() -> None:
    found = bench(BenchConfig(profile=True, chunks=1, device="cuda"))["results"]["fast"]["kernels"]
    for part, kind in (("generate + cache", "matrix products"), ("decode", "convolutions")):
        assert found[part]["kinds"][kind] > 0 and found[part]["whole"] > found[part]["gaps"]

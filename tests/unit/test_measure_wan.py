"""runs/measure_wan.py on the CPU at a tiny scale: it must run where it is needed, on a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[2] / "runs" / "measure_wan.py"
TINY = ["--scale", "tiny", "--device", "cpu", "--chunks", "3"]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_wan", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict]:
    return list(json.loads(path.read_text())["rows"])


def test_every_case_is_measured(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    out = tmp_path / "m.json"
    assert program.main([*TINY, "--offload", "both", "--text", "hold", "--out", str(out)]) == 0
    made = rows(out)
    assert [(r["model"], r["offload"]) for r in made] == [
        ("1.3B", False), ("1.3B", True), ("14B", False), ("14B", True)
    ]  # fmt: skip
    for row in made:
        for name in ("load_s", "text_s", "generate_s", "cache_s", "decode_s", "fps_with_decode"):
            assert row[name] > 0, name
        assert all(len(seconds) == 3 for seconds in row["chunks"].values())
        assert row["fps"] == pytest.approx(16 / (row["generate_s"] + row["cache_s"]))
        assert row["peak_gib"] is None and row["no_decode"] == ""
    assert capsys.readouterr().out.count("peak not measured") == 4


def test_weights_come_from_files_and_the_decode_may_be_left_out(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    out, folder = tmp_path / "m.json", tmp_path / "weights"
    one = [*TINY, "--models", "1.3B", "--out", str(out)]
    assert program.main([*one, "--save", str(folder)]) == 0
    assert (folder / "diffusion_pytorch_model.safetensors").is_file()
    assert program.main([*one, "--folder", str(folder)]) == 0
    (row,) = rows(out)
    assert "decode_s" not in row and "needs diffusers" in row["no_decode"]
    assert "no decode: the Wan codec needs diffusers" in capsys.readouterr().out


@torch.inference_mode()
def test_random_weights_are_finite_and_blocks_alike(program: ModuleType) -> None:
    config = program.replace(program.MODELS["1.3B"], **program.TINY)
    model = program.build(config, None, torch.device("cpu"), torch.bfloat16, False)
    first, last = model.blocks[0].state_dict(), model.blocks[-1].state_dict()
    for name, p in model.named_parameters():
        assert p.isfinite().all() and p.float().abs().sum() > 0, name
    assert all(torch.equal(first[n], last[n]) for n in first)
    assert model.proj_out.weight.dtype == torch.bfloat16
    x = torch.randn(1, 16, 1, 4, 4)
    assert model(x, torch.ones(1), torch.randn(1, 5, 32)).isfinite().all()


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--models", "5B"], "--models must be of 1.3B, 14B, got '5B'"),
        (["--sizes", "830x480"], "multiples of 16, got '830x480'"),
        (["--sizes", "wide"], "got 'wide'"),
        (["--chunks", "0"], "--chunks must be at least 1, got 0"),
        (["--cap-gib", "16"], "--cap-gib needs a CUDA device"),
        (["--folder", "x"], "are of one model"),
        (["--models", "1.3B", "--folder", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(
    program: ModuleType, flags: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "m.json"
    assert program.main([*TINY, "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_it_imports_nothing_that_a_bare_machine_lacks() -> None:
    check = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('m', sys.argv[1]); "
        "s.loader.exec_module(u.module_from_spec(s)); "
        "print([m for m in ('av', 'tyro', 'rich', 'transformers', 'diffusers', 'ftfy') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, str(FILE)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

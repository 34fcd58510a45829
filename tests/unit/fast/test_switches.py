"""Compiling, kernels, float8 and what happens to switches that a machine cannot honour."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.fast import config as config_module
from aad1.fast import ops
from aad1.fast.config import OFF, FastConfig, default_config, usable
from aad1.fast.rollout import FastRollout
from aad1.models.dit import WanConfig, WanTransformer
from aad1.rollout.stream import Rollout, seeded_noise

CPU = torch.device("cpu")
SMALL = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=3, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip


def build(device: str = "cpu", dtype: torch.dtype = torch.float32) -> WanTransformer:
    torch.manual_seed(0)
    net = WanTransformer(SMALL).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.cast(dtype).to(device)


@torch.no_grad()
def both(
    geometry: ChunkGeometry,
    config: FastConfig,
    chunks: int = 6,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    how: str = "stream",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same clip from the plain and from the fast rollout."""
    model = build(device, dtype)
    torch.manual_seed(1)
    image, text = torch.randn(1, 4, 1, 4, 6).to(device), torch.randn(1, 3, 8).to(device)
    noise = seeded_noise([0], geometry, (4, 4, 6), torch.device(device))
    plain = list(Rollout(model, geometry).stream(image, lambda i: text, noise, chunks))
    fast = FastRollout(model, geometry, config=config)
    got = list(getattr(fast, how)(image, lambda i: text, noise, chunks))
    return torch.cat(got, 2), torch.cat(plain, 2)


@pytest.mark.parametrize("how", ["stream", "merged"])
@pytest.mark.parametrize("window", [9, 17])
def test_compiled_without_graph_breaks_and_not_again_as_the_cache_fills(
    window: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    counts = []
    for chunks in (3, 12):  # the third chunk is the first of the steady kind at window 9
        got, want = both(ChunkGeometry(window=window), FastConfig(cudnn=False), chunks, how=how)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[1]
    torch._dynamo.reset()


@torch.no_grad()
def test_a_second_video_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    geometry = ChunkGeometry(window=17)  # positions count on, the sink is kept unrotated too
    fast = FastRollout(build(), geometry, config=replace(OFF, compile=True, precompute=True))
    noise = seeded_noise([0], geometry, (4, 4, 6), CPU)
    image, text = torch.randn(1, 4, 1, 4, 6), torch.randn(1, 3, 8)
    counts = []
    for _ in range(2):
        list(fast.stream(image, lambda i: text, noise, 4))
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[1]
    torch._dynamo.reset()


def test_row_wise_float8_is_close_and_its_scales_are_right() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 48) * torch.logspace(-3, 3, 64)[:, None]  # rows of very different sizes
    w, b = torch.randn(32, 48), torch.randn(32)
    w8, scale = ops.quantise_rows(w)
    assert w8.dtype == torch.float8_e4m3fn and scale.shape == (32, 1)
    torch.testing.assert_close((w8.float() * scale).abs().amax(1), w.abs().amax(1))
    layer = ops.Linear(w8, b, scale)
    exact = x @ w.T + b
    got = ops.linear(x, layer, False, x.dtype)
    # e4m3 has three bits of mantissa: 3.6% rms per factor at most, less over a sum.
    error = (got - exact).norm(dim=1) / exact.norm(dim=1)
    assert 1e-3 < float(error.max()) < 0.06
    torch.testing.assert_close(ops.linear(x, layer.rows(8), False, x.dtype), got[:, 8:])
    product = (ops.quantise_rows(x)[0].double() * ops.quantise_rows(x)[1].double()) @ (
        w8.double() * scale.double()
    ).T + b.double()
    torch.testing.assert_close(got.double(), product, atol=2e-3, rtol=1e-5)


def test_a_rollout_in_float8_stays_near_the_exact_one() -> None:
    config = FastConfig(compile=False, cudnn=False, fp8=True)
    got, want = both(ChunkGeometry(), config)
    error = float((got - want).norm() / want.norm())
    assert 1e-4 < error < 0.15


def test_the_models_own_weights_stay_what_they_were(tmp_path: Path) -> None:
    """q, k and v become views of one matrix: the model still runs and is saved as before."""
    model, before = build(), build().state_dict()
    FastRollout(model, ChunkGeometry(), config=OFF)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = WanTransformer.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(v, before[k]) for k, v in again.items())


def test_what_cannot_work_is_named_in_one_warning_and_left_out() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asked = FastConfig(compile=False, triton=True, graph=True, fp8=True)
        got = usable(asked, CPU, ChunkGeometry(), width=1536 + 8)
    assert len(caught) == 1
    message = str(caught[0].message)
    for name in ("cudnn", "graph", "image_graph", "triton", "fp8"):
        assert name in message and not getattr(got, name)
    assert got.precompute
    assert "1544 is not a multiple of 16" in message
    asked = replace(OFF, graph=True, image_graph=True)
    with pytest.warns(UserWarning, match="graph, image_graph .without precompute"):
        got = usable(asked, torch.device("cuda"), ChunkGeometry(), 1536)
    assert got == OFF
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = default_config(CPU, 1536)
        assert usable(plain, CPU, ChunkGeometry(), 1536) == plain
    with pytest.raises(UserError, match="no part 'speed' of the fast path; known: precompute"):
        FastConfig().without("speed")


def test_an_older_gpu_without_float8_is_seen_before_the_first_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on newer devices\nmore")

    monkeypatch.setattr(ops, "fp8_product", refuse)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: torch.full((32, 64), 1.0))
    reason = config_module.fp8_fails(torch.device("cuda"), 1536)
    assert "no row-wise float8 product: torch._scaled_mm is only supported" in reason
    assert "more" not in reason


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "machine,why",
    [
        ("no Triton", "needs Triton, which is not installed"),
        ("old GPU", "compute capability 7.0, this GPU has 6.1"),
        ("no C compiler", "needs a C compiler, and neither gcc nor clang is installed"),
    ],
)
def test_a_machine_that_cannot_compile_is_seen_before_the_first_chunk(
    machine: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = config_module.importlib.util.find_spec
    there = machine != "no Triton"
    monkeypatch.setattr(
        config_module.importlib.util, "find_spec",
        lambda name, *a: object() if name == "triton" and there else
        None if name == "triton" else find(name, *a),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = (6, 1) if machine == "old GPU" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    compiler = None if machine == "no C compiler" else "/usr/bin/gcc"
    monkeypatch.setattr(config_module.shutil, "which", lambda name: compiler)
    asked = FastConfig(triton=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = usable(asked, CUDA, ChunkGeometry(), 1536)
    (message,) = [str(w.message) for w in caught]
    assert (
        "\n" not in message
        and "compile, compile_decoder" in message
        and why
        in (
            message
            if machine != "no Triton"
            else message.replace("Triton is", "needs Triton, which is")
        )
    )
    assert got == asked.without("compile", "compile_decoder", "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and no second warning for what was left out already
        assert usable(got, CUDA, ChunkGeometry(), 1536) == got


def test_a_machine_that_can_compile_keeps_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(config_module.shutil, "which", lambda name: "/usr/bin/gcc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = FastConfig(triton=True, graph=True)
        assert usable(asked, CUDA, ChunkGeometry(), 1536) == asked


def test_sizes_that_float8_cannot_take_are_named() -> None:
    with pytest.warns(UserWarning, match=r"without fp8 \(a feed-forward width of 100 is not a mul"):
        got = usable(OFF.__class__(**(vars(OFF) | {"fp8": True})), CPU, ChunkGeometry(), 64, 100)
    assert not got.fp8


def test_flags_that_contradict_or_gain_nothing_are_told() -> None:
    asked = partial(config_module.asked_config, CPU, 64)
    assert asked(plain=True, fp8=False, without="") is None
    assert asked(plain=False, fp8=False, without="") == default_config(CPU, 64)
    with pytest.raises(UserError, match="--plain leaves the fast path out"):
        asked(plain=True, fp8=True, without="")
    with pytest.raises(UserError, match="no part 'speed'"):
        asked(plain=False, fp8=False, without="speed")
    with pytest.warns(UserWarning, match="float8 gains no time on a cpu device"):
        config = asked(plain=False, fp8=True, without="precompute")
    assert config is not None and config.fp8 and not config.precompute
    assert config_module.asked_config(
        torch.device("mps"), 64, plain=False, fp8=False, without=""
    ) is None  # fmt: skip


KERNELS = """
import sys
import torch
import torch.nn.functional as F
from aad1.fast import ops

def near(rows, exact):
    # float8 has three bits of mantissa; the largest of each row is exact
    assert rows.values.dtype == torch.float8_e4m3fn and rows.scale.shape == (*exact.shape[:-1], 1)
    got = rows.values.float() * rows.scale
    wrong = (got - exact).abs() > exact.abs() / 16 + rows.scale / 512
    # Triton's interpreter drops the carry where a value rounds up to a power of two.
    assert wrong.float().mean() < (0.05 if sys.argv[1] == "cpu" else 1e-9)
    torch.testing.assert_close(448 * rows.scale[..., 0], exact.abs().amax(-1), rtol=1e-5, atol=0)

torch.set_default_device(sys.argv[1])
torch.manual_seed(0)
x, branch = torch.randn(2, 2, 3, 5, 96)
scale, shift, gate = torch.randn(3, 1, 3, 1, 96)
for s, t in ((scale, shift), (scale[:, :1], shift[:, :1])):
    for more in ((None, None), (branch, None), (branch, gate), (branch, gate[:, 1:2])):
        a, b = (ops.add_norm(x, *more, s, t, 1e-6, k) for k in (True, False))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        y, rows = ops.add_norm(x, *more, s, t, 1e-6, True, quantise=True)
        torch.testing.assert_close(y, b[0], atol=1e-6, rtol=1e-6)
        near(rows, b[1])
    a, b = (ops.gated_add(x, branch, s, k) for k in (True, False))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
near(ops.Rows(*ops._quantised(x, True, gelu=False)), x)
near(ops.Rows(*ops._quantised(4 * x, True, gelu=True)), F.gelu(4 * x, approximate="tanh"))
wide = torch.randn(2, 3, 5, 288)
part = wide.chunk(3, -1)[1]
angles = torch.randn(3, 5, 1, 24)
table = (angles.cos(), angles.sin())
weight = torch.randn(96)
cache = torch.zeros(2, 7, 5, 2, 48)
outs = (cache[:, 2:5], None)
got = ops.norm_rope(part, weight, 1e-6, 2, (table, table), outs, True)
want = ops.norm_rope(part, weight, 1e-6, 2, (table, table), (None, None), False)
for value in (cache[:, 2:5], got[1]):
    torch.testing.assert_close(value, want[0], atol=1e-5, rtol=1e-5)
assert cache[:, :2].abs().max() == 0 == cache[:, 5:].abs().max()
print("kernels agree")
"""


def agree(device: str, **environment: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, device], env=os.environ | environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "kernels agree", done.stderr[-2000:]


def test_triton_kernels_agree_with_the_formulas_when_interpreted() -> None:
    agree("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_triton_kernels_agree_with_the_formulas_on_cuda() -> None:
    agree("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_float8_on_cuda_is_as_near_to_float32_as_its_formula(compiled: bool) -> None:
    exact = both(ChunkGeometry(), OFF)[1]
    formula = both(ChunkGeometry(), replace(OFF, fp8=True))[0]
    for triton in (False, True):
        config = FastConfig(fp8=True, compile=compiled, triton=triton)
        got = both(ChunkGeometry(), config, device="cuda", dtype=torch.bfloat16)[0].cpu()
        error, usual = ((x - exact).norm() / exact.norm() for x in (got, formula))
        assert error < 1.5 * usual


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["stream", "merged"])
@pytest.mark.parametrize("window", [9, 17])
@pytest.mark.parametrize(
    "config",
    [
        FastConfig(compile=False),
        FastConfig(),
        FastConfig(compile=False, triton=True),
        FastConfig(triton=True),
        FastConfig(compile=False, graph=True),
        FastConfig(graph=True),
    ],
    ids=str,
)
def test_cuda_equals_the_plain_rollout(config: FastConfig, window: int, how: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # graphs with longer windows
        got, want = both(ChunkGeometry(window=window), config, 9, "cuda", how=how)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)  # TF32 may be on


@pytest.mark.gpu
@torch.no_grad()
def test_the_image_pass_as_a_graph_takes_each_videos_own_image_and_prompt() -> None:
    geometry, cuda = ChunkGeometry(), torch.device("cuda")
    model = build("cuda")
    noise = seeded_noise([0], geometry, (4, 4, 6), cuda)
    fast = FastRollout(model, geometry, config=FastConfig(compile=False))
    inputs = [(torch.randn(1, 4, 1, 4, 6).cuda(), torch.randn(1, 3, 8).cuda()) for _ in range(4)]
    for image, text in (*inputs, *inputs):  # prompts have memory for two
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                got = list(fast.stream(image, lambda i, t=text: t, noise, 2))
                want = list(Rollout(model, geometry).stream(image, lambda i, t=text: t, noise, 2))
            torch.testing.assert_close(torch.cat(got), torch.cat(want), atol=1e-3, rtol=1e-3)
    (session,) = fast._free
    assert len(session._graphs) == 2  # one for each memory that prompts have
    longer = FastRollout(model, ChunkGeometry(window=17), config=FastConfig(compile=False))
    for _ in range(3):
        list(longer.stream(*inputs[0][:1], lambda i: inputs[0][1], noise, 5))
    assert len(longer._free[0]._graphs) == 1


@pytest.mark.gpu
@torch.no_grad()
def test_another_thread_may_use_the_device_while_a_graph_is_captured() -> None:
    geometry, text = ChunkGeometry(), torch.randn(1, 3, 8).cuda()
    fast = FastRollout(build("cuda"), geometry, config=FastConfig(compile=False))
    noise = seeded_noise([0], geometry, (4, 4, 6), torch.device("cuda"))
    ended, failed = threading.Event(), []

    def other() -> None:
        size = 2**20
        try:
            while not ended.is_set():  # sizes that no memory is kept for
                size += 2**20
                torch.zeros(size % 2**28, device="cuda").pow(2).sum().item()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(20):
            session = fast.session(1, 4, 6)  # each captures anew
            fast._free.clear()
            session.prefill(torch.randn(1, 4, 1, 4, 6).cuda(), text)
            got = session.generate(text, noise)
    finally:
        ended.set()
        thread.join()
    assert not failed and bool(torch.isfinite(got).all())


@pytest.mark.gpu
def test_cuda_bfloat16_is_as_near_to_float32_as_the_plain_path() -> None:
    exact = both(ChunkGeometry(), OFF)[1]
    got, plain = (
        x.cpu() for x in both(ChunkGeometry(), FastConfig(), device="cuda", dtype=torch.bfloat16)
    )
    error, usual = ((x - exact).norm() / exact.norm() for x in (got, plain))
    assert error < 1.1 * usual

"""Teacher sampling and prompts against diffusers' own WanPipeline, on a tiny random Wan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aad1.errors import UserError
from aad1.models.umt5 import NEGATIVE_PROMPT
from aad1.pipeline import Pipeline
from aad1.rollout.solvers import SolverName, grid, solver
from aad1.rollout.teacher import Sampling, sample_prompts

diffusers = pytest.importorskip("diffusers")

PROMPTS = [
    "a cat walks",
    "  two&amp;amp;nbsp; dogs  &lt;b&gt;\n\t walk ",  # entities escaped twice, white space
    "a schÃ¶n cafÃ© itâ€™s",  # text read in a wrong encoding
    "",
    "red " * 600,  # longer than the encoder reads
]


@pytest.fixture(scope="module")
def pipe(wan_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(wan_folder)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.filterwarnings("ignore:a prompt has")
def test_prompts_equal_wanpipelines(pipe: Pipeline, diffusers_wan: Any, prompt: str) -> None:
    with torch.no_grad():
        want, _ = diffusers_wan.encode_prompt(prompt, max_sequence_length=512, device="cpu")
    got = pipe.encode_prompt(prompt)
    assert got.shape == (1, 512, 16)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    tokens = len(diffusers_wan.tokenizer(prompt)["input_ids"])
    if tokens < 256:
        assert float(got[:, tokens + 4 :].abs().max()) == 0


def test_prompts_in_one_call_do_not_touch_each_other(pipe: Pipeline) -> None:
    both = pipe.text(["a cat", "two red dogs walk"])
    assert torch.equal(both[:1], pipe.text(["a cat"]))
    assert not torch.equal(both[0], both[1])


def scheduler(name: SolverName, shift: float) -> Any:
    if name == "unipc":
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


@pytest.mark.parametrize("name", ["unipc", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_solvers_equal_diffusers_schedulers(name: SolverName, steps: int, shift: float) -> None:
    theirs = scheduler(name, shift)
    theirs.set_timesteps(steps)
    ours = grid(name, steps, shift)
    want = theirs.sigmas.double()
    torch.testing.assert_close(
        torch.tensor(ours.sigmas, dtype=torch.float64), want, atol=1e-7, rtol=0
    )
    shown = torch.tensor(ours.shown, dtype=torch.float64) * 1000
    torch.testing.assert_close(shown.float(), theirs.timesteps.float(), atol=1e-4, rtol=0)

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(3 * x) + t * x - 0.3

    x = y = torch.linspace(-2, 2, 60).view(1, 1, 3, 4, 5)
    take = solver(name, ours.sigmas)
    for t in theirs.timesteps:
        level = float(t) / 1000
        x = theirs.step(field(x, level), t, x).prev_sample
        y = take.step(y, field(y, level))
        torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-5)


def test_unipc_is_of_higher_order_than_euler() -> None:
    """An independent check: closer to the exact solution of dx/dsigma = 2 x on the same levels."""
    errors = {}
    sigmas = tuple(np.linspace(0.9, 0.1, 9).tolist())
    for name in ("unipc", "euler"):
        x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
        take = solver(name, sigmas)  # type: ignore[arg-type]
        for _ in sigmas[1:]:
            x = take.step(x, 2 * x)
        errors[name] = abs(float(x) - float(np.exp(-1.6)))
    assert errors["unipc"] < 0.2 * errors["euler"]


@pytest.mark.parametrize("name", ["unipc", "euler"])
@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_teacher_sampling_equals_wanpipeline(
    pipe: Pipeline, diffusers_wan: Any, name: SolverName, size: tuple[int, int]
) -> None:
    """10 steps, CFG 5, negative prompt: latents to 1e-4, frames to one level of 256."""
    width, height = size
    plain = diffusers_wan.scheduler
    diffusers_wan.scheduler = scheduler(name, 3.0)
    call: dict[str, Any] = dict(
        prompt="a cat walks", negative_prompt="blurred", width=width, height=height, num_frames=9,
        num_inference_steps=10, guidance_scale=5.0, return_dict=False,
    )  # fmt: skip
    try:
        seeded = torch.Generator().manual_seed(7)
        latents = diffusers_wan(**call, generator=seeded, output_type="latent")[0]
        seeded = torch.Generator().manual_seed(7)
        want = diffusers_wan(**call, generator=seeded, output_type="np")[0][0]
    finally:
        diffusers_wan.scheduler = plain
    sampling = Sampling(steps=10, guidance=5.0, shift=3.0, solver=name, negative_prompt="blurred")
    noise = torch.randn(
        (1, 16, 3, height // 8, width // 8), generator=torch.Generator().manual_seed(7)
    )
    got = sample_prompts(pipe.transformer, pipe.text, ["a cat walks"], noise, sampling)
    assert float(latents.std()) > 0.1
    torch.testing.assert_close(got, latents, atol=1e-4, rtol=1e-4)
    video = pipe.sample("a cat walks", seed=7, size=size, frames=9, sampling=sampling)
    assert video.shape == (9, height, width, 3)
    assert float(np.abs(video.numpy() - want * 255).max()) <= 1.01
    # Planted differences that the comparison would notice:
    for change in (dict(guidance=4.9), dict(shift=3.1), dict(negative_prompt="red")):
        changed = Sampling(**{**vars(sampling), **change})
        other = sample_prompts(pipe.transformer, pipe.text, ["a cat walks"], noise, changed)
        assert float((other - latents).abs().max()) > 1e-3


def test_the_folder_says_how_it_is_sampled(pipe: Pipeline) -> None:
    assert pipe.info.stage == "teacher" and pipe.info.text_to_video
    assert pipe.info.sampling == Sampling(shift=3.0, negative_prompt=NEGATIVE_PROMPT)
    assert (pipe.info.width, pipe.info.height, pipe.info.fps, pipe.info.frames) == (
        832, 480, 16.0, 21,
    )  # fmt: skip
    assert pipe.frames(pipe.info.frames) == 81


def test_a_batch_of_prompts_equals_each_alone(pipe: Pipeline) -> None:
    noise = torch.randn(2, 16, 2, 4, 4)
    sampling = Sampling(steps=3, guidance=3.0)
    network, text = pipe.transformer, pipe.text
    both = sample_prompts(network, text, ["a cat", "two dogs"], noise, sampling)
    alone = sample_prompts(network, text, ["two dogs"], noise[1:], sampling)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda p: p.sample("a", size=(832, 490)), r"height 490 is not divisible by 16 .nearest 480"
         r" or 496"),
        (lambda p: p.sample("a", size=(8, 480)), r"width 8 is not divisible by 16 .nearest 16"),
        (lambda p: p.sample("a", size=(32, 32), frames=10), "nearest are 9 and 13"),
        (lambda p: p.sample("a", sampling=Sampling(steps=0)), "steps must be at least 1, got 0"),
        (lambda p: p.sample("a", sampling=Sampling(shift=0)), "shift must be above 0, got 0"),
        (lambda p: p.sample("a", sampling=Sampling(solver="heun")), "exact, euler, unipc, got"),
        (lambda p: p.stream(None, "a"), "bidirectional teacher"),
    ],
)  # fmt: skip
def test_bad_calls_name_the_value(
    pipe: Pipeline, call: Callable[[Pipeline], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        call(pipe)
    assert "\n" not in str(error.value)

"""The packaged doom model does what its prompt says, from frames of maps it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from aad1.evaluate.motion import motion
from aad1.media.images import read_image
from aad1.model_names import PACKAGED
from aad1.pipeline import Pipeline

FRAMES = sorted((PACKAGED / "doom_frames").glob("*.png"))
CHUNKS = 2


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("doom")


@pytest.fixture(scope="module")
def images(pipe: Pipeline) -> torch.Tensor:
    return torch.cat([pipe.encode_image(path) for path in FRAMES])


def video(pipe: Pipeline, images: torch.Tensor, prompt: str) -> torch.Tensor:
    captions = [[prompt]] * len(images)
    latents = pipe.generate_latents(images, captions, range(len(images)), CHUNKS)
    return torch.cat([pipe.codec.decode(part) for part in latents.split(4)])


@pytest.fixture(scope="module")
def made(pipe: Pipeline, images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {p: video(pipe, images, p) for p in ("turn left", "turn right", "stand still")}


def test_it_turns_as_it_is_told(made: dict[str, torch.Tensor]) -> None:
    # What stands ahead moves to the right while the player turns left.
    for prompt, sign in (("turn left", 1), ("turn right", -1)):
        across = motion(made[prompt], stride=4).direction[:, 0] * sign
        assert (across > 0.5).double().mean() >= 0.9, f"{prompt}: {across.tolist()}"


def test_standing_still_is_stiller_than_turning(made: dict[str, torch.Tensor]) -> None:
    still, turning = (motion(made[p], stride=4).magnitude for p in ("stand still", "turn left"))
    assert still.mean() < 0.5 * turning.mean()


def test_the_first_frame_is_the_given_one(made: dict[str, torch.Tensor]) -> None:
    given = torch.stack([read_image(path, width=128, height=96) for path in FRAMES])
    for clips in made.values():
        error = (clips[:, 0].float() - given.float()).square().mean()
        assert 10 * torch.log10(255**2 / error) > 30


def test_its_lineage_is_the_papers_order(pipe: Pipeline) -> None:
    stages, parent = [pipe.info.stage], pipe.info.parent
    while parent:
        stages.append(parent["stage"])
        parent = parent["parent"]
    assert stages == ["aad", "dmd", "ode", "teacher"]


def test_every_packaged_frame_has_a_caption_the_model_knows(pipe: Pipeline) -> None:
    captions = json.loads((PACKAGED / "doom_frames" / "captions.json").read_text())
    assert set(captions) == {path.name for path in FRAMES}
    known = set(pipe.text.config.words)  # type: ignore[attr-defined]
    assert all(set(caption.split()) <= known for caption in captions.values())
    sizes = {Image.open(Path(path)).size for path in FRAMES}
    assert sizes == {(pipe.info.width, pipe.info.height)}


def test_its_cards_name_the_makers_of_the_game() -> None:
    for folder in ("doom", "doom_frames"):
        card = (PACKAGED / folder / "README.md").read_text()
        assert "Freedoom" in card
        assert "ViZDoom" in card
        assert "BSD 3-Clause" in card

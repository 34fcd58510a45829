"""The fast rollout against the plain one, over geometries, prompts, noise levels and switches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.fast import slots as slots_module
from aad1.fast.config import FastConfig
from aad1.fast.rollout import FastRollout
from aad1.models.dit import WanConfig, WanTransformer
from aad1.rollout.stream import Rollout, seeded_noise

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=3, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip
PLAIN = FastConfig(compile=False, cudnn=False, compile_decoder=False, early=False)
GEOMETRIES = [
    ChunkGeometry(),  # the paper's: one past chunk
    ChunkGeometry(window=5),  # the sink alone
    ChunkGeometry(window=7),  # half a past chunk
    ChunkGeometry(window=13),  # two past chunks
    ChunkGeometry(window=12),  # a ring that a chunk may straddle
    ChunkGeometry(chunk=3, first=3, sink=0, window=21),  # Self-Forcing's
    ChunkGeometry(chunk=2, first=2, sink=0, window=4),
    ChunkGeometry(chunk=1, first=1, sink=0, window=6),
    ChunkGeometry(chunk=2, sink=3, window=9),  # a sink longer than the image
    ChunkGeometry(chunk=2, sink=3, window=7),
    ChunkGeometry(chunk=2, first=4, sink=1, window=5),  # a long first chunk
    ChunkGeometry(chunk=4, sink=0, window=8),
    ChunkGeometry(chunk=3, first=3, sink=0, window=21, relative=False),  # as Self-Forcing trains
    ChunkGeometry(chunk=2, first=2, sink=0, window=4, relative=False),
]


def build(prediction: str = "velocity", seed: int = 0) -> WanTransformer:
    torch.manual_seed(seed)
    net = WanTransformer(WanConfig(**(vars(TINY) | {"prediction": prediction}))).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return build()


def inputs(geometry: ChunkGeometry, batch: int = 1) -> tuple[torch.Tensor, Callable, Callable]:
    """An image, a prompt that changes at chunk 3, and noise."""
    torch.manual_seed(1)
    image = torch.randn(batch, 4, geometry.first, 4, 6)
    prompts = [torch.randn(batch, 3, 8) for _ in range(2)]
    noise = seeded_noise(range(batch), geometry, (4, 4, 6), torch.device("cpu"))
    return image, lambda i: prompts[i >= 3], noise


@torch.no_grad()
def difference(model: WanTransformer, geometry: ChunkGeometry, *, how: str = "stream",
               batch: int = 1, chunks: int = 9, sigmas: tuple[float, ...] = (1.0,),
               config: FastConfig = PLAIN, image: bool = True) -> float:  # fmt: skip
    first, text, noise = inputs(geometry, batch)
    given = first if image else None
    plain = list(Rollout(model, geometry, sigmas).stream(given, text, noise, chunks))
    fast = FastRollout(model, geometry, sigmas, config)
    got = list(getattr(fast, how)(given, text, noise, chunks))
    assert [g.shape for g in got] == [p.shape for p in plain]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("how", ["stream", "merged"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_it_gives_what_the_plain_rollout_gives(
    model: WanTransformer, geometry: ChunkGeometry, how: str
) -> None:
    assert difference(model, geometry, how=how) < 1e-5


@pytest.mark.parametrize("how", ["stream", "merged"])
@pytest.mark.parametrize("window", [9, 13])
@pytest.mark.parametrize(
    "change",
    [
        dict(batch=3),
        dict(sigmas=(1.0, 0.8, 0.4)),
        dict(config=PLAIN.without("precompute")),
    ],
    ids=str,
)
def test_batches_steps_and_switches(
    model: WanTransformer, window: int, how: str, change: dict[str, object]
) -> None:
    assert difference(model, ChunkGeometry(window=window), how=how, **change) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["stream", "merged"])
def test_text_to_video_and_x0_prediction(how: str) -> None:
    geometry = ChunkGeometry(chunk=3, first=3, sink=0, window=9)
    assert difference(build("x0"), geometry, how=how, image=False) < 1e-5


@pytest.mark.parametrize("how", ["stream", "merged"])
@pytest.mark.parametrize(
    "geometry",
    [
        ChunkGeometry(window=13),
        ChunkGeometry(window=12),
        ChunkGeometry(chunk=3, first=3, sink=0, window=12),
    ],
    ids=str,
)
def test_positions_turn_back_before_the_limit(
    model: WanTransformer, geometry: ChunkGeometry, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "LIMIT", 24)
    bases = set()
    prepare = slots_module.Slots.prepare

    def watch(self: slots_module.Slots, start: int, size: int, end: int) -> None:
        prepare(self, start, size, end)
        assert end - self.base <= 24
        bases.add(self.base)

    monkeypatch.setattr(slots_module.Slots, "prepare", watch)
    assert difference(model, geometry, how=how, chunks=16) < 1e-5
    assert len(bases) > 2  # it did turn back, more than once


def test_positions_and_memory_stay_where_they_are(model: WanTransformer) -> None:
    """One past chunk: a few tables, however long the video, and a sink that is never rotated."""
    geometry = ChunkGeometry()
    image, text, noise = inputs(geometry)
    fast = FastRollout(model, geometry, config=PLAIN)
    session = fast.session(1, 4, 6)
    session.prefill(image, text(0))
    sink = session.slots.k[:, :, :1].clone()
    place = session.slots.k.data_ptr()
    for chunk in range(1, 12):
        session.commit(session.generate(text(chunk), noise), text(chunk))
    assert torch.equal(session.slots.k[:, :, :1], sink)
    assert session.slots.k.data_ptr() == place
    assert set(session.slots.positions._kept) == {(0,), (1, 2, 3, 4), (5, 6, 7, 8)}


def test_a_session_is_used_again_and_two_at_once_do_not_mix(model: WanTransformer) -> None:
    geometry = ChunkGeometry()
    image, text, noise = inputs(geometry)
    fast = FastRollout(model, geometry, config=PLAIN)
    want = list(fast.stream(image, text, noise, 4))
    one, two = fast.stream(image, text, noise, 4), fast.stream(-image, text, noise, 4)
    mixed = [(next(one), next(two))[0] for _ in range(4)]
    one.close()
    two.close()
    for got in (mixed, list(fast.stream(image, text, noise, 4))):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "bug", ["stale prompt", "position", "store", "sink", "last layer", "blind"]
)
def test_planted_bugs_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would pass a comparison that is too loose or too short."""
    from aad1.fast import rollout
    from aad1.fast.place import Place

    net, window, how = build(), 9, "stream"
    slots = slots_module.Slots
    if bug == "stale prompt":
        monkeypatch.setattr(rollout._Prompts, "of", lambda self, rows: self.__dict__.setdefault(
            "first", self._transformer.text(rows)))  # fmt: skip
    elif bug == "position":
        plain = slots._own_positions
        monkeypatch.setattr(
            slots, "_own_positions", lambda s, a, b: tuple(p + (a > 5) for p in plain(s, a, b))
        )
    elif bug == "store":
        monkeypatch.setattr(slots, "store_table", lambda self, start, size: None)
    elif bug == "sink":
        window = 13
        monkeypatch.setattr(slots, "turn_sink", lambda *_, **__: None)
    elif bug == "last layer":
        finish = Place.write
        monkeypatch.setattr(
            Place, "write",
            lambda self, layer, k, v=None: finish(self, min(layer, 1), k, v),
        )  # fmt: skip
    else:
        how = "merged"  # noisy rows that see the cache of before, not the clean chunk
        filled = slots.filled
        monkeypatch.setattr(slots, "filled", lambda s, a, b: min(5, filled(s, a, b)))
    assert difference(net, ChunkGeometry(window=window), how=how) > 1e-4


def test_absolute_positions_beside_a_sink_are_refused_by_name(model: WanTransformer) -> None:
    with pytest.raises(UserError, match="relative=True"):
        FastRollout(model, ChunkGeometry(relative=False))

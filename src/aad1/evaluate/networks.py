"""Two small networks per world for what pixels alone do not tell: who is there, what moves how.

A frame encoder learnt that two frames of one real video belong together and frames of others do
not (instance discrimination); the consistency figures are VBench's formulas on it. A motion network
learnt to tell, from eight frames, how a world's camera and objects move; the motion Fréchet
distance is taken between its features. Both were trained by `runs/train_metrics.py` on real clips
of one world and mean nothing on another. With other backbones than VBench's, nothing here is
comparable to its numbers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aad1.atomic import replace_file
from aad1.errors import UserError

PACKAGED = Path(__file__).parents[1] / "packaged" / "metric_networks"
FORMAT = "aad1.metric-networks.1"
WINDOW = 8
"""Frames that the motion network sees at once."""
CONSISTENCY = ("subject", "background", "first_frame", "last_frame")
"""What `FrameEncoder.consistency` gives, in its order."""

_CORNER = 3 / 8
"""Of a frame's sides: the four corners stand for the background."""
_IMAGES_AT_ONCE = 256
_WINDOWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class NetworksConfig:
    """Sizes of both networks."""

    world: str
    height: int
    """Frames are averaged down (or up) to this size."""
    width: int
    stride: int
    """The motion network sees every stride-th frame."""
    targets: int
    """Numbers that the motion network was trained to tell."""
    widths: tuple[int, ...] = (24, 48, 96, 128)
    features: int = 64
    motion_widths: tuple[int, ...] = (48, 96, 128)
    motion_features: int = 16

    @property
    def span(self) -> int:
        """Video frames of a window."""
        return 1 + (WINDOW - 1) * self.stride


class FrameEncoder(nn.Module):
    """A frame -> a direction in feature space."""

    def __init__(self, config: NetworksConfig) -> None:
        super().__init__()
        widths = (3, *config.widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in config.widths)
        self.out = nn.Linear(2 * config.widths[-1], config.features)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] in -1..1 -> [N, features] of length 1."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.gelu(norm(layer(x)))
        pooled = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return F.normalize(self.out(pooled), dim=1)


class MotionNet(nn.Module):
    """Eight grey frames -> features, and from them what it was trained to tell.

    The frames are the channels of a picture: a kernel spans all of them.
    """

    def __init__(self, config: NetworksConfig) -> None:
        super().__init__()
        widths = (WINDOW, *config.motion_widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 5 if a == WINDOW else 3, stride=2, padding=2 if a == WINDOW else 1)
            for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) for w in config.motion_widths)
        self.out = nn.Linear(2 * config.motion_widths[-1], config.motion_features)
        self.told = nn.Linear(config.motion_features, config.targets)

    def forward(self, x: Tensor) -> Tensor:
        """Windows [N, 8, H, W] in -1..1 -> [N, motion_features]."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.gelu(norm(layer(x)))
        pooled = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        features: Tensor = self.out(pooled)
        return features


class Networks(nn.Module):
    """Both networks of a world."""

    def __init__(self, config: NetworksConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.motion = FrameEncoder(config), MotionNet(config)

    @torch.no_grad()
    def consistency(self, videos: Tensor) -> Tensor:
        """float64 [N, 4] (on the CPU), see `CONSISTENCY`; videos uint8 [N, T, H, W, 3].

        subject, background: mean over t of [cos+(f_t, f_t-1) + cos+(f_t, f_0)] / 2, of whole frames
        and of their four corners. first_frame: 0.4 max_t cos(f_t, f_0) + 0.3 mean_t c_t +
        0.3 min_t c_t with c_t = cos+(f_t, f_t-1) (VBench-I2V's subject score, f_0 being the given
        image). last_frame: cos+(f_last, f_0). cos+ is the cosine, at least 0.
        """
        whole = self._encoded(frames_of(videos, self.config))
        corners = self._encoded(corners_of(videos, self.config)).mean(dim=2)
        corners = F.normalize(corners, dim=-1)
        first = _cos(whole[:, 1:], whole[:, :1])
        step = _cos(whole[:, 1:], whole[:, :-1]).clamp(min=0)
        mixed = 0.4 * first.amax(dim=1) + 0.3 * step.mean(dim=1) + 0.3 * step.amin(dim=1)
        scores = [_steady(whole), _steady(corners), mixed, first[:, -1].clamp(min=0)]
        return torch.stack(scores, dim=1).cpu().double()

    def _encoded(self, pictures: Tensor) -> Tensor:
        shape = pictures.shape[:-3]
        flat = pictures.flatten(0, -4)
        parts = [self.encoder(some) for some in flat.split(_IMAGES_AT_ONCE)]
        return torch.cat(parts).view(*shape, -1)

    @torch.no_grad()
    def motion_features(self, videos: Tensor) -> Tensor:
        """float64 [N, windows, motion_features] of uint8 [N, T, H, W, 3]; windows follow one
        another without overlap, none fit into a video shorter than `config.span`."""
        windows = windows_of(videos, self.config)
        number, count = windows.shape[:2]
        if count == 0:
            return torch.zeros(number, 0, self.config.motion_features, dtype=torch.float64)
        parts = [self.motion(some) for some in windows.flatten(0, 1).split(_WINDOWS_AT_ONCE)]
        return torch.cat(parts).view(number, count, -1).cpu().double()

    def fingerprint(self) -> str:
        """Tells these weights from others."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.half().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes one safetensors file with weights in float16."""
        from safetensors.torch import save_file

        tensors = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        header = {"format": FORMAT, "config": json.dumps(asdict(self.config))}
        with replace_file(path) as temporary:
            save_file(tensors, temporary, header)


def load(path: Path, device: torch.device | str = "cpu") -> Networks:
    """Reads what `Networks.save` wrote; UserError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
            plain = json.loads(header["config"])
            plain |= {name: tuple(plain[name]) for name in ("widths", "motion_widths")}
            networks = Networks(NetworksConfig(**plain))
            weights = {name: file.get_tensor(name).float() for name in list(file.keys())}
        networks.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"cannot read metric networks from {path}: {line}") from None
    return networks.eval().requires_grad_(False).to(device)


def for_world(world: str, device: torch.device | str = "cpu") -> Networks | None:
    """The packaged networks of a world, None if it has none."""
    path = PACKAGED / f"{world}.safetensors"
    return load(path, device) if path.is_file() else None


# ---- how videos are put before the networks -----------------------------------------------------


def frames_of(videos: Tensor, config: NetworksConfig) -> Tensor:
    """uint8 [N, T, H, W, 3] -> float [N, T, 3, height, width] in -1..1."""
    return _sized(videos, config).view(*videos.shape[:2], 3, config.height, config.width)


def corners_of(videos: Tensor, config: NetworksConfig) -> Tensor:
    """float [N, T, 4, 3, height, width]: the corners of each frame, enlarged to a frame's size."""
    height, width = (round(side * _CORNER) for side in videos.shape[2:4])
    rows = (slice(0, height), slice(-height, None))
    columns = (slice(0, width), slice(-width, None))
    parts = [frames_of(videos[:, :, r, c], config) for r in rows for c in columns]
    return torch.stack(parts, dim=2)


def windows_of(videos: Tensor, config: NetworksConfig) -> Tensor:
    """float [N, windows, 8, height, width] in -1..1, grey."""
    count = videos.shape[1] // config.span
    used = videos[:, : count * config.span]
    light = frames_of(used, config).mean(dim=2) if count else None
    if light is None:
        return torch.zeros(len(videos), 0, WINDOW, config.height, config.width)
    return light.unflatten(1, (count, config.span))[:, :, :: config.stride]


def _sized(videos: Tensor, config: NetworksConfig) -> Tensor:
    pictures = videos.flatten(0, 1).permute(0, 3, 1, 2).float()
    size = (config.height, config.width)
    if pictures.shape[2:] != size:
        if pictures.shape[2] >= size[0] and pictures.shape[3] >= size[1]:
            pictures = F.interpolate(pictures, size=size, mode="area")
        else:
            pictures = F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
    return pictures / 127.5 - 1


def _cos(one: Tensor, other: Tensor) -> Tensor:
    """Of vectors of length 1, [..., D]."""
    return (one * other).sum(dim=-1)


def _steady(features: Tensor) -> Tensor:
    step = _cos(features[:, 1:], features[:, :-1]).clamp(min=0)
    first = _cos(features[:, 1:], features[:, :1]).clamp(min=0)
    return ((step + first) / 2).mean(dim=1)

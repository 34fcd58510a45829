"""Train the light causal codec on recorded clips, for a given number of minutes.

    python runs/train_codec.py --data out/doom/train --out out/doom/codec --minutes 4

--data holds safetensors files, each with a tensor `video` uint8 [N, T, H, W, 3]. All of it is kept
on the device as uint8, so a step needs no work on the CPU. Writes the codec folder, a sheet
(original left, reconstruction right) and prints the final figures as one line of JSON.

--init goes on from a codec; `packaged` is the one of the packaged doom model. With --decoder-only
latents mean what they did, to the bit, so generators trained on them stay valid. That is how to
give a decoder its texture late:

    python runs/train_codec.py --data out/data/doom --heldout out/data/doom-heldout \\
        --init out/doom/codec --decoder-only --refine 8 --texture 0 --subbands 0.8 --lr 4e-4 \\
        --minutes 3 --out out/doom/codec_sharp

Reconstructions of clips that training does not see are judged before, during and after: PSNR,
FDnss against those same clips as recorded (0 for equal frames), and the amplitude of each kind of
texture relative to theirs (subbands.py). OUT/figures.json holds all of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import aad1
from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.evaluate.frechet import frame_features
from aad1.evaluate.report import Gaussian
from aad1.models.causal_codec import CausalCodec, CausalCodecConfig
from aad1.models.codec import load_codec, to_pixels
from aad1.stages.codec_loss import (
    CodecLossConfig,
    CodecStage,
    PatchDiscriminator,
    psnr,
    sharpness_ratio,
)
from aad1.stages.subbands import amplitude_ratios, fixed_pattern

PACKAGED = Path(aad1.__file__).parent / "packaged" / "doom" / "codec"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--blend", type=float, default=1.0, help="how far to go from --init to the result, 0..1")
    add("--data", type=Path, required=True, help="folder of training shards")
    add(
        "--heldout", type=Path, help="folder of held-out shards (default: the last clips of --data)"
    )
    add("--heldout-clips", type=int, default=32)
    add("--out", type=Path, required=True, help="codec folder to write")
    add(
        "--init",
        type=Path,
        help="codec folder to start from, or `packaged`; its sizes replace the size flags",
    )
    add(
        "--decoder-only",
        "--freeze-encoder",
        dest="freeze_encoder",
        action="store_true",
        help="leave the encoder and the latents as they are; needs --init",
    )
    add(
        "--refine",
        type=int,
        default=0,
        help="channels of a correction at full resolution (packaged: has 8); 0 adds none",
    )
    add("--minutes", type=float, default=4.0, help="training time, compilation left out")
    add("--batch", type=int, default=16)
    add("--frames", type=int, default=17, help="frames of a training window, 1 + 4 k")
    add("--crop", type=int, default=0, help="train on random square crops of this size (0: whole)")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=200, help="updates")
    add("--ema", type=float, default=0.999)
    add("--noise", type=float, default=CodecLossConfig.noise)
    add("--texture", type=float, default=CodecLossConfig.texture)
    add("--subbands", type=float, default=CodecLossConfig.subbands)
    add("--pattern", type=float, default=CodecLossConfig.pattern)
    add("--gan", type=float, default=0.0, help="weight of the patch critic, 0 for none")
    add("--gan-from", type=float, default=0.6, help="share of the time after which it begins")
    add("--widths", type=int, nargs=4, default=CausalCodecConfig.widths)
    add("--decoder-depths", type=int, nargs=4, default=CausalCodecConfig.decoder_depths)
    add("--encoder-depths", type=int, nargs=4, default=CausalCodecConfig.encoder_depths)
    add("--latent-channels", type=int, default=CausalCodecConfig.latent_channels)
    add("--report-every", type=float, default=20.0, help="seconds")
    add("--report-clips", type=int, default=8, help="clips judged in a report, of those held out")
    add("--save-dtype", choices=["float16", "float32"], default="float16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true")
    add("--max-clips", type=int, default=0, help="use at most so many training clips (0: all)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 <= args.blend <= 1 or (args.blend < 1 and not args.init):
        parser.error("--blend must be within [0, 1], and below 1 needs --init")
    if args.init == Path("packaged"):
        args.init = PACKAGED
    if args.freeze_encoder and not args.init:
        parser.error("--freeze-encoder needs --init: an untrained encoder is not worth keeping")
    return args


def read_clips(folder: Path) -> Tensor:
    """All clips of a folder, uint8 [N, T, H, W, 3]."""
    files = sorted(folder.glob("**/*.safetensors"))
    if not files:
        raise SystemExit(f"no .safetensors shards in {folder}")
    return torch.cat([load_file(str(file))["video"] for file in files])


def start(args: argparse.Namespace, clips: Tensor) -> CausalCodec:
    """The codec to train, on the device of `clips`: that of --init, or a new one fitted to them."""
    if args.init:
        codec = load_codec(args.init, device=clips.device)
        if not isinstance(codec, CausalCodec):
            raise SystemExit(f"--init {args.init} is a {type(codec).__name__}, not a CausalCodec")
        if args.refine not in (0, codec.config.refine_width):
            try:
                codec = codec.with_refinement(args.refine)
            except UserError as error:
                raise SystemExit(f"--refine {args.refine}: {error}") from None
        codec.train()
    else:
        config = CausalCodecConfig(
            latent_channels=args.latent_channels,
            widths=tuple(args.widths),
            decoder_depths=tuple(args.decoder_depths),
            encoder_depths=tuple(args.encoder_depths),
            refine_width=args.refine,
        )
        codec = CausalCodec(config).to(clips.device)
        sample = torch.randperm(len(clips))[:256].to(clips.device)
        codec.fit_linear(clips[sample][:, : args.frames])
    codec.encoder.requires_grad_(not args.freeze_encoder)
    return codec


class Windows:
    """Random windows of random clips, half of them mirrored; drawn and cut on the device."""

    def __init__(self, clips: Tensor, frames: int, batch: int, crop: int) -> None:
        if clips.shape[1] < frames:
            raise SystemExit(f"clips of {clips.shape[1]} frames are shorter than {frames}")
        self.clips = clips
        self.frames = frames
        self.batch = batch
        self.crop = crop

    def draw(self) -> Tensor:
        """uint8 [batch, frames, H, W, 3]."""
        total, length, height, width = self.clips.shape[:4]
        device = self.clips.device
        clip = torch.randint(total, (self.batch, 1), device=device)
        start = torch.randint(length - self.frames + 1, (self.batch, 1), device=device)
        window = self.clips[clip, start + torch.arange(self.frames, device=device)]
        if self.crop:
            # On the CPU: an index on the device would have to be waited for.
            top = int(torch.randint(height - self.crop + 1, ()))
            left = int(torch.randint(width - self.crop + 1, ()))
            window = window[:, :, top : top + self.crop, left : left + self.crop]
        mirror = torch.rand(self.batch, 1, 1, 1, 1, device=device) < 0.5
        return torch.where(mirror, window.flip(3), window)


def with_fallback(compiled: Callable, eager: Callable) -> Callable:
    """Call `compiled`; after its first failure say so and call `eager` from then on."""
    works = True

    def call(*arguments: object) -> object:
        nonlocal works
        if works:
            try:
                return compiled(*arguments)
            except Exception as error:
                works = False
                print(f"torch.compile failed, going on without: {type(error).__name__}", flush=True)
                print(str(error)[:500], file=sys.stderr)
        return eager(*arguments)

    return call


@torch.no_grad()
def evaluate(codec: CausalCodec, clips: Tensor, noise: float = 0.0) -> dict[str, float]:
    """Figures of whole reconstructed clips, `noise` (in std) added to their latents.

    FDnss is that of the last quarter of the frames, to the same frames as recorded; pattern is what
    repeats every 8 pixels (`fixed_pattern`), in grey levels.
    """
    outputs = []
    for part in clips.split(4):
        latents = codec.encode(part)
        generator = torch.Generator("cpu").manual_seed(0)
        draw = torch.randn(latents.shape, generator=generator).to(latents)
        outputs.append(codec.decode(latents + noise * spread(latents) * draw))
    output = torch.cat(outputs)
    recorded = Gaussian.of(frame_features(clips, "late"))
    figures = {
        "psnr": psnr(output, clips),
        "sharpness": sharpness_ratio(output, clips),
        "FDnss": recorded.distance(frame_features(output, "late")),
        "pattern": float(fixed_pattern(to_pixels(output) - to_pixels(clips)).mean()) * 127.5,
        **amplitude_ratios(output, clips),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def spread(latents: Tensor) -> Tensor:
    """Standard deviation of each channel, [1, C, 1, 1, 1]."""
    return latents.std(dim=(0, 2, 3, 4), keepdim=True)


def write_sheet(path: Path, clips: Tensor, output: Tensor) -> None:
    """Rows of frames of a clip: originals left, reconstructions right."""
    picks = [0, clips.shape[1] // 2, clips.shape[1] - 1]
    rows = [
        torch.cat([*(clip[i] for i in picks), *(other[i] for i in picks)], dim=1)
        for clip, other in zip(clips, output, strict=True)
    ]
    with replace_file(path) as temporary:
        Image.fromarray(torch.cat(rows).cpu().numpy()).save(temporary)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")

    clips = read_clips(args.data)
    if args.heldout:
        heldout = read_clips(args.heldout)[: args.heldout_clips]
    else:
        count = min(args.heldout_clips, len(clips) // 4)
        clips, heldout = clips[:-count], clips[-count:]
    if args.max_clips:
        clips = clips[: args.max_clips]
    whole = 1 + (heldout.shape[1] - 1) // 4 * 4
    clips, heldout = clips.to(device), heldout[:, :whole].to(device)
    windows = Windows(clips, args.frames, args.batch, args.crop)

    codec = start(args, clips)
    average = copy.deepcopy(codec).eval().requires_grad_(False)
    pairs = zip(average.parameters(), codec.parameters(), strict=True)
    initial = copy.deepcopy(codec)
    averaged, trained = zip(*((a, p) for a, p in pairs if p.requires_grad), strict=True)
    critic = PatchDiscriminator().to(device) if args.gan > 0 else None
    loss_config = CodecLossConfig(
        noise=args.noise, texture=args.texture, subbands=args.subbands, pattern=args.pattern
    )
    stage = CodecStage(codec, loss_config, critic)

    generator_loss: Callable = stage.generator_loss
    critic_loss: Callable = stage.critic_loss
    if args.compile:
        generator_loss = with_fallback(torch.compile(stage.generator_loss), stage.generator_loss)
        critic_loss = with_fallback(torch.compile(stage.critic_loss), stage.critic_loss)
    optimizer = torch.optim.AdamW(
        trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda
    )
    critic_optimizer = (
        torch.optim.AdamW(critic.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=cuda)
        if critic
        else None
    )

    def update(share: float, step: int) -> dict[str, Tensor]:
        """One update at this share of the time; returns its logs."""
        batch = windows.draw()
        logs: dict[str, Tensor] = {}
        adversarial = None
        if critic is not None and critic_optimizer is not None and share >= args.gan_from:
            critic.train().requires_grad_(True)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss, logs = critic_loss(batch)
            critic_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            critic_optimizer.step()
            critic.eval().requires_grad_(False)
            ramp = min(1.0, (share - args.gan_from) / 0.1)
            adversarial = torch.tensor(args.gan * ramp, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss, more = generator_loss(batch, adversarial)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        rate = args.lr * min(1.0, (step + 1) / args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, trained, 1 - decay)
        return logs | more

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    parameters = sum(p.numel() for p in codec.parameters())
    print(
        f"{len(clips)} clips {list(clips.shape[1:])}, {len(heldout)} held out, "
        f"{parameters / 1e6:.2f}M parameters, {device}",
        flush=True,
    )
    judged = heldout[: args.report_clips]
    history: list[dict[str, object]] = []

    def report(step: int, elapsed: float, values: dict[str, float]) -> None:
        figures = evaluate(average, judged)
        history.append({"update": step, "seconds": round(elapsed, 1), **figures, "loss": values})
        print(f"{elapsed:6.0f} s  update {step}  {json.dumps(figures)}  {values}", flush=True)

    before = evaluate(codec.eval(), heldout) if args.init else {}
    codec.train()
    report(0, 0.0, {})
    begun = clock()
    for step in range(3):  # compiles, and lets cuDNN choose; outside the time budget
        update(0.0, step)
    if critic is not None:
        update(args.gan_from, 3)
        critic.load_state_dict(PatchDiscriminator().to(device).state_dict())
    print(f"first updates {clock() - begun:.1f} s", flush=True)

    budget = 60 * args.minutes
    begun = clock()
    evaluating = 0.0  # seconds spent on reports, outside the budget
    reported, step = 0.0, 4
    elapsed = 0.0
    while elapsed < budget:
        logs = update(elapsed / budget, step)
        step += 1
        elapsed = time.perf_counter() - begun - evaluating
        if elapsed - reported >= args.report_every:
            paused = clock()
            elapsed = paused - begun - evaluating
            values = {name: round(float(value), 4) for name, value in logs.items()}
            if not math.isfinite(values["loss"]):
                raise SystemExit(f"the loss is not finite at update {step}: {values}")
            report(step, elapsed, values)
            evaluating += clock() - paused
            reported = elapsed

    if args.blend < 1:
        pairs = zip(average.parameters(), initial.parameters(), strict=True)
        for value, first in pairs:
            value.copy_(first.detach().lerp(value, args.blend))
    if not args.freeze_encoder:
        pieces = [average.encode(windows.draw()) for _ in range(max(1, 512 // args.batch))]
        average.calibrate(torch.cat(pieces))
    average.save_pretrained(args.out, getattr(torch, args.save_dtype))
    saved = load_codec(args.out, device=device)
    assert isinstance(saved, CausalCodec)
    shown = heldout[:8]
    write_sheet(args.out / "sheet.png", shown, saved.decode(saved.encode(shown)))
    latents = torch.cat([saved.encode(part) for part in heldout.split(4)])
    result = {
        "updates": step,
        "minutes": round(args.minutes, 2),
        "parameters": parameters,
        "heldout_clips": len(heldout),
        "before": before,
        "after": evaluate(saved, heldout),
        "after_noise_0.1": evaluate(saved, heldout, noise=0.1),
        "latents_std": round(float(latents.std()), 4),
        "latents_abs_max": round(float(latents.abs().max()), 3),
    }
    flags = {name: str(value) for name, value in vars(args).items()}
    with replace_file(args.out / "figures.json") as temporary:
        record = {"flags": flags, **result, "history": history}
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

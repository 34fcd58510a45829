"""A stand-in for a checkout of VBench: its layout, JSON, class and call names; scores of our own.

VBench's networks are replaced by pixel statistics, so that a test can compute what must come out.
What is VBench's: where files lie and weights are looked for, how videos are found and named, which
classes and functions are called with which arguments, and the form of the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from aad1.vbench.environment import Environment
from aad1.vbench.protocol import DIMENSIONS, Pair, Places, read_pairs
from aad1.vbench.videos import make_videos, wanted_videos

SUBJECT = ["i2v_subject", "subject_consistency", "motion_smoothness", "dynamic_degree"]
BACKGROUND = ["i2v_background", "background_consistency"]
BOTH = ["aesthetic_quality", "imaging_quality", "temporal_flickering"]
ENTRIES = [
    ("a dog runs", SUBJECT + BOTH),
    ("a lake, with fog", BACKGROUND + BOTH),
    ("a lake, with fog, camera pans left", ["camera_motion"]),
    ("A cat sleeps.", SUBJECT + BOTH),
]
RATIO = "26-15"

SUITE = """
import importlib, json, os
from pathlib import Path

def read_behaviour():
    return json.loads(Path(__file__).parents[1].joinpath("standin.json").read_text())

class VBench(object):
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info_dir, self.output_path = device, full_info_dir, output_path
        os.makedirs(output_path, exist_ok=True)

    def build_full_info_json(self, videos_path, name, dimension_list, mode="vbench_standard", **kw):
        video_names = os.listdir(videos_path)
        chosen = []
        if mode == "custom_input":
            for video in video_names:
                chosen.append({"prompt_en": video.rsplit("-", 1)[0], "dimension": dimension_list,
                               "video_list": [os.path.join(videos_path, video)]})
        else:
            postfix = Path(video_names[0]).suffix
            for entry in json.load(open(self.full_info_dir)):
                if set(dimension_list) & set(entry["dimension"]):
                    names = [f"{entry['prompt_en']}-{i}{postfix}" for i in range(5)]
                    for video in set(names) - set(video_names):
                        print("WARNING!!! This required video is not found!", video)
                    entry["video_list"] = [os.path.join(videos_path, n) for n in names
                                           if n in video_names]
                    chosen.append(entry)
        path = os.path.join(self.output_path, name + "_full_info.json")
        json.dump(chosen, open(path, "w"))
        return path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False,
                 read_frame=False, mode="vbench_standard", **kwargs):
        from vbench2_beta_i2v.utils import init_submodules
        submodules = init_submodules(dimension_list, local=local)
        info = self.build_full_info_json(videos_path, name, dimension_list, mode=mode)
        self.compute(info, name, dimension_list, submodules, kwargs)

    def compute(self, info, name, dimension_list, submodules, kwargs):
        results = {}
        for dimension in dimension_list:
            package = "vbench2_beta_i2v" if dimension.startswith("i2v") else "vbench"
            module = importlib.import_module(f"{package}.{dimension}")
            call = getattr(module, f"compute_{dimension}")
            results[dimension] = call(info, self.device, submodules[dimension], **kwargs)
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump(results, file, indent=4)
"""

SUITE_I2V = """
from vbench import VBench
from vbench2_beta_i2v.utils import init_submodules

class VBenchI2V(VBench):
    def evaluate(self, videos_path, name, dimension_list=None, custom_image_folder=None,
                 mode="vbench_standard", local=False, read_frame=False, resolution="1-1", **kwargs):
        submodules = init_submodules(dimension_list, local=local, resolution=resolution)
        info = self.build_full_info_json(videos_path, name, dimension_list, mode=mode)
        self.compute(info, name, dimension_list, submodules, kwargs)
"""

UTILS = """
import os, subprocess, torch
CACHE_DIR = os.environ.get("VBENCH_CACHE_DIR") or os.path.expanduser("~/.cache/vbench")
HUB = os.path.join(os.environ["TORCH_HOME"], "hub")
WEIGHTS = {weights}

def init_submodules(dimension_list, local=False, read_frame=False, resolution="1-1"):
    found = {{}}
    for dimension in dimension_list:
        for path in WEIGHTS[dimension]:
            path = path.format(cache=CACHE_DIR, hub=HUB, root=".")
            if not os.path.exists(path):
                folder = os.path.dirname(path)
                subprocess.run(["wget", "-P", folder, "https://example.org/weights"], check=True)
        found[dimension] = {{"resolution": resolution}}
    return found
"""

COMPUTE = """
import json, os, sys
import av
import numpy as np
from PIL import Image
from vbench import read_behaviour

def frames_of(path):
    with av.open(path) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])

def score(dimension, frames, image):
    frames = frames.astype(float)
    if dimension == "imaging_quality":
        return frames.mean(axis=(1, 2, 3)).mean() / 255 * 100
    if dimension == "dynamic_degree":
        return bool(np.abs(np.diff(frames, axis=0)).mean() > 1)
    if dimension.startswith("i2v"):
        shown = np.asarray(Image.open(image).convert("RGB").resize(frames.shape[2:0:-1]), float)
        return 1 - np.abs(frames[0] - shown).mean() / 255
    return 1 - np.abs(np.diff(frames, axis=0)).mean() / 255

def compute(dimension, json_dir, device, submodules, **kwargs):
    behaviour = read_behaviour()
    with open(behaviour["calls"], "a") as file:
        told = {"dimension": dimension, "pid": os.getpid(), "device": str(device), "kwargs": kwargs,
                "pythonpath": os.environ.get("PYTHONPATH"), "argv0": sys.argv[0]}
        file.write(json.dumps(told) + "\\n")
    if dimension in behaviour["crash"]:
        print("printed before the error")
        raise RuntimeError("out of memory, says the stand-in")
    if dimension in behaviour["die"]:
        os.abort()
    root = "vbench2_beta_i2v/data/crop/" + submodules["resolution"]
    rows = []
    for entry in json.load(open(json_dir)):
        for video in entry["video_list"]:
            image = os.path.join(root, entry.get("image_name", ""))
            rows.append({"video_path": video,
                         "video_results": score(dimension, frames_of(video), image)})
    if dimension in behaviour["drop"]:
        rows = rows[:-1]
    if dimension in behaviour["nan"]:
        rows[0]["video_results"] = float("nan")
    total = float(np.mean([row["video_results"] for row in rows]))
    if dimension == "imaging_quality" and dimension not in behaviour["percent"]:
        total /= 100
    return total, rows
"""

TORCH = """
class cuda:
    @staticmethod
    def is_available():
        from vbench import read_behaviour
        return read_behaviour()["cuda"]

def device(name):
    return name
"""


def build(root: Path, *, images: bool = True, **behaviour: object) -> Places:
    """A stand-in checkout at `root` with weights beside it; behaviour: see `behave`."""
    files = {"vbench/__init__.py": SUITE, "vbench2_beta_i2v/__init__.py": SUITE_I2V}
    weights = {name: d.weights for name, d in DIMENSIONS.items()}
    files["vbench2_beta_i2v/utils.py"] = UTILS.format(weights=repr(weights))
    files["vbench/compute.py"] = COMPUTE
    files["torch.py"] = TORCH  # importing the real one in each process takes seconds
    for name, dimension in DIMENSIONS.items():
        body = f"import functools\nfrom vbench.compute import compute\ncompute_{name} = "
        files[dimension.module.replace(".", "/") + ".py"] = (
            f"{body}functools.partial(compute, {name!r})\n"
        )
    entries = [
        {"prompt_en": p, "dimension": d, "image_type": "x", "image_name": image_name(p)}
        for p, d in ENTRIES
    ]
    files["vbench2_beta_i2v/vbench2_i2v_full_info.json"] = json.dumps(entries)
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    places = Places(root, root.parent / "cache", root.parent / "torch" / "hub", RATIO)
    if images:
        places.images.mkdir(parents=True)
        for number, (prompt, _) in enumerate(ENTRIES):
            pixels = np.random.default_rng(number).integers(0, 256, (15, 26, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((208, 120))
            picture.save(places.images / image_name(prompt))
    for name in DIMENSIONS:
        for path in places.weights(name):
            file = path / "adapter_model.bin" if path.name == "ensemble_lora" else path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"random")
    behave(root, **behaviour)
    return places


def behave(root: Path, **changes: object) -> None:
    """crash, die, nan, drop, percent: lists of dimensions; cuda: whether there is a device."""
    plain = dict(crash=[], die=[], nan=[], drop=[], percent=[], cuda=True)
    calls = str(root / "calls.jsonl")
    (root / "standin.json").write_text(json.dumps(plain | {"calls": calls} | changes))


def calls(root: Path) -> list[dict[str, object]]:
    """What the stand-in's compute functions were told, in order."""
    path = root / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def image_name(prompt: str) -> str:
    return f"{prompt.split(', camera')[0]}.png"


def moving(seed: int, *, frames: int = 5, side: int = 128, speed: int = 3) -> torch.Tensor:
    """A smooth pattern that slides and brightens, uint8 [frames, side, side, 3]; of this seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    phases, gains = rng.uniform(0, 6, 3), rng.uniform(0.3, 0.8, frames)
    out = [
        np.stack([g * (1 + np.sin((x + y + speed * t) / 9 + p)) / 2 for p in phases], -1)
        for t, g in enumerate(gains)
    ]
    return torch.from_numpy(np.rint(np.stack(out) * 255).astype(np.uint8))


def fake_make(image: Path, prompt: str, seed: int) -> Iterator[torch.Tensor]:
    """Moves or not, by the seed: dynamic degree must tell them apart."""
    video = moving(seed)
    yield video[:1]
    yield video[1:] if seed % 2 else video[:1].repeat(4, 1, 1, 1)


@dataclass(frozen=True)
class Bench:
    """A stand-in checkout and a complete set of videos for it."""

    places: Places
    pairs: list[Pair]
    out: Path

    @property
    def videos(self) -> Path:
        return self.out / "videos"

    @property
    def environment(self) -> Environment:
        return Environment(self.places, Path(sys.executable), "cuda", self.out / "work")


def make_bench(folder: Path) -> Bench:
    places = build(folder / "VBench")
    pairs = read_pairs(places.root)
    out = folder / "out"
    wanted = wanted_videos(pairs, places.images)
    make_videos(out / "videos", wanted, fake_make, fps=8.0, settings={"model": "fake"})
    return Bench(places, pairs, out)

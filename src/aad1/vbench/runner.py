"""Run by the Python of VBench's environment, from its checkout: one job, told by a JSON file.

Imports nothing of aad1, which is not installed there. The file's text is handed to `python -c`:
that puts the working folder, the checkout, first on the import path, and not this folder.

    {"do": "imports", "modules": [...], "out": FILE}
        which of the modules cannot be imported, and whether CUDA is there
    {"do": "set", ...}        VBenchI2V on the standard set
    {"do": "any", ...}        VBench's custom_input on any folder of videos
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import sys
from typing import Any

PACKAGES = (
    "torch", "torchvision", "numpy", "decord", "openai-clip", "pyiqa", "dreamsim", "timm",
    "transformers", "opencv-python", "opencv-python-headless", "vbench",
)  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def imports(job: dict[str, Any]) -> dict[str, Any]:
    failed: dict[str, str] = {}
    for name in job["modules"]:
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed[name] = f"{type(error).__name__}: {error}"
    try:
        cuda = bool(importlib.import_module("torch").cuda.is_available())
    except BaseException:
        cuda = False
    return {"failed": failed, "cuda": cuda, "versions": versions()}


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if job["dimension"] == "imaging_quality":
        extra["imaging_quality_preprocessing_mode"] = "longer"
    if job["do"] == "set":
        suite = importlib.import_module("vbench2_beta_i2v").VBenchI2V
        extra["resolution"] = job["ratio"]
    else:
        suite = importlib.import_module("vbench").VBench
        extra["mode"] = "custom_input"
    device = importlib.import_module("torch").device(job["device"])  # as evaluate_i2v.py has it
    suite(device, job["info"], job["folder"]).evaluate(
        videos_path=job["videos"],
        name=job["dimension"],
        dimension_list=[job["dimension"]],
        local=True,
        **extra,
    )
    return {"versions": versions()}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    found = imports(job) if job["do"] == "imports" else evaluate(job)
    with open(job["out"], "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()

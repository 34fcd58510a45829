"""Measure what a live session costs per chunk, on the plain and on the fast path.

    python runs/measure_session.py --model doom --chunks 20

No server and no clock: the session's model is asked for chunk after chunk as a viewer who changes
the prompt would have it, every third one made ahead and thrown away. Prints medians in milliseconds
of a chunk's passes ("dit": all but the decode and the cache pass), its cache pass and its decode;
on the CPU with one thread (OMP_NUM_THREADS=1) in CPU time, which other processes do not add to.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from types import SimpleNamespace

import torch

from aad1.model_names import PACKAGED
from aad1.pipeline import Pipeline
from aad1.serve import model as session_model
from aad1.serve.facts import read_facts
from aad1.serve.model import PipelineModel


def clock() -> float:
    """Seconds of this process's CPU time, or of the wall once a GPU's work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def run(model: PipelineModel, chunks: int) -> dict[str, list[float]]:
    """Milliseconds per chunk, of those after the window is full."""
    facts = read_facts("model", model.pipeline)
    name, prompt = next(iter(facts.samples.items()))
    texts = [model.encode(p) for p in (prompt, *list(facts.keys.values())[:2])]
    point = model.begin(PACKAGED / f"{facts.world}_frames" / name, 0)
    spans: dict[str, list[float]] = {"dit": [], "cache pass": [], "decode": []}
    for chunk in range(chunks + 4):
        for attempt in range(1 + (chunk % 3 == 2)):  # every third one is made twice
            made = model.generate(point, texts[(chunk // 3 + attempt) % len(texts)])
            began = clock()
            model.settle(made.after)
            ended = clock()
            if chunk >= 4:
                spans["dit"].append(1000 * made.seconds["dit"])
                spans["decode"].append(1000 * made.seconds["decode"])
                spans["cache pass"].append(1000 * (ended - began))
        point = made.after
    return spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="doom")
    parser.add_argument("--chunks", type=int, default=20)
    args = parser.parse_args()
    session_model.time = SimpleNamespace(perf_counter=clock)  # type: ignore[attr-defined]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, fast in (("plain", False), ("fast", True)):
        pipe = Pipeline.from_pretrained(args.model, device=device, fast=fast)
        spans = run(PipelineModel(pipe), args.chunks)
        figures = {k: f"{median(v):.1f} ({min(v):.1f})" for k, v in spans.items()}
        total = median(a + b for a, b in zip(spans["dit"], spans["cache pass"], strict=True))
        print(f"{name:6} {figures}  dit + cache pass {total:.1f} ms", flush=True)


if __name__ == "__main__":
    main()

"""The table of a benchmark: with rich where it is installed, plain otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STAGES = (
    "text", "image encode", "prefill", "generate pass", "cache pass", "merged pass", "decode",
    "hand-over", "chunk",
)  # fmt: skip
TOTALS = {
    "dit_ms": "DiT per chunk, ms",
    "dit_fps": "DiT only, frames/s",
    "fps": "end to end, frames/s",
    "first_pixels_ms": "first pixels, ms",
    "warm_up_s": "warm-up, s",
    "peak_memory_gib": "peak memory, GiB",
    "difference": "difference",
}


def show(out: Mapping[str, Any]) -> None:
    """Print what `aad1.bench.run.bench` returns."""
    machine = ", ".join(f"{k} {v}" for k, v in out["machine"].items() if k != "device")
    geometry = ", ".join(f"{k} {v}" for k, v in out["geometry"].items())
    width, height = out["size"]
    print(f"{out['machine']['device']}; {machine}; {out['date']}")
    print(f"{'; '.join(out['notes'])}; {out['dtype']}; {width}x{height}")
    print(f"{geometry}; noise levels {', '.join(f'{s:g}' for s in out['sigmas'])}; "
          f"{out['frames_per_chunk']} frames per chunk")  # fmt: skip
    names = list(out["results"])
    _table(["median (p90), ms", *names], rows(out["results"]))
    print(f"difference: of the first latents, relative to {out['difference_to']}")
    for part, found in out["results"].get("fast", {}).get("kernels", {}).items():
        kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in found["kinds"].items() if ms)
        print(f"{part}, ms: {kinds}; gaps {found['gaps']:.1f}; whole {found['whole']:.1f}")
        for name, ms, count in found["top"]:
            print(f"  {ms:8.2f} {count:5d}x  {name[:90]}")
    if "decode_error" in out:
        errors = out["decode_error"]
        print(f"decode against float32: plain {errors['plain']:.2%}, fast {errors['fast']:.2%}")


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """One row per stage and per total, one column per way to run."""
    table = []
    for stage in STAGES:
        cells = [_span(r["stages"].get(stage)) for r in results.values()]
        if any(cells):
            table.append([stage, *cells])
    for key, title in TOTALS.items():
        style = "{:.1e}" if key == "difference" else "{:.1f}"
        table.append([title, *(style.format(r[key]) if key in r else "" for r in results.values())])
    return table


def _span(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    digits = 1 if value["median"] >= 10 else 2
    return f"{value['median']:.{digits}f} ({value['p90']:.{digits}f})"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
        for row in [header, *body]:
            cells = [c.ljust(w) if i == 0 else c.rjust(w)
                     for i, (c, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
            print("  ".join(cells))
        return
    table = Table(box=None)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in body:
        table.add_row(*row)
    Console(width=max(100, 24 + 20 * len(header))).print(table)

"""Writes docs/evidence.md and its plots from docs/evidence/*.json.

python runs/evidence_report.py
"""

from __future__ import annotations

from pathlib import Path

from aad1.evidence.report import write


def main() -> None:
    docs = Path(__file__).parents[1] / "docs"
    (docs / "evidence").mkdir(exist_ok=True)
    for path in write(docs / "evidence", docs / "evidence.md"):
        print(path)


if __name__ == "__main__":
    main()

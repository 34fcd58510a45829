"""`python -m aad1.evidence`: see `run.py`, or --help."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from aad1.errors import UserError
from aad1.evidence import gate, measure
from aad1.evidence.arms import GROUPS, plan
from aad1.evidence.run import Runner, Settings
from aad1.train.guard import Stopped

PUBLISHED = Path("docs/evidence")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="aad1.evidence", description=__doc__)
    add = p.add_argument
    add("--work", type=Path, help="weights and real clips (default out/evidence)")
    add("--results", type=Path, help="folder of results (default docs/evidence)")
    add("--minutes", type=float, default=math.inf, help="begin no run that would end later")
    add("--groups", nargs="+", choices=GROUPS, help="only these groups")
    add("--arms", nargs="+", metavar="NAME", help="only these runs, as in A-s0, in plan order")
    add("--list", action="store_true", help="print the plan and what is done, then stop")
    add("--ignore-gate", default="", metavar="REASON", help="run arms although the gate is closed")
    add("--override", nargs="+", default=[], metavar="STAGE.FIELD=VALUE",
        help="try other settings up to the gate (aad.optim.lr=1e-5); needs --label")  # fmt: skip
    add("--label", default="", help="name of the trial")
    add("--commit", default="", help="commit of the code, where there is no repository")
    add("--device", default="auto")
    add("--no-compile", action="store_true", help="do not compile the teacher's blocks")
    add("--tiny", action="store_true", help="a few updates each, to test the machinery on a CPU")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or out of time, 2 a mistake in what was given."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"aad1: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 0


def run(args: argparse.Namespace) -> int:
    whole = plan("evidence-tiny", 2, 2) if args.tiny else plan()
    arms = whole
    name = "evidence-tiny" if args.tiny else "evidence"
    results = args.results or (Path("out") / name / "results" if args.tiny else PUBLISHED)
    if args.override or args.label:
        if not (args.override and args.label):
            raise UserError("--override and --label go together")
        arms = gate.trial(whole, args.label, args.override)
        if arms_given := (args.groups or args.arms):
            raise UserError(f"a trial runs up to the gate; leave out {' '.join(arms_given)}")
    if args.groups:
        arms = [arm for arm in arms if arm.group in args.groups]
    if args.arms:
        unknown = set(args.arms) - {arm.name for arm in arms}
        if unknown:
            raise UserError(f"no run {sorted(unknown)[0]!r}; --list shows all")
        arms = [arm for arm in arms if arm.name in args.arms]
    if not args.minutes > 0:
        raise UserError(f"--minutes must be above 0, got {args.minutes:g}")
    runner = Runner(
        arms,
        Settings(
            work=args.work or Path("out") / name, results=results,
            published=() if args.tiny or results == PUBLISHED else (PUBLISHED,),
            minutes=args.minutes, sizes=measure.TINY if args.tiny else measure.Sizes(),
            device="cpu" if args.tiny and args.device == "auto" else args.device,
            commit=args.commit, ignore_gate=args.ignore_gate, compile=not args.no_compile,
            known_seconds=not args.tiny,
        ),
        whole,
    )  # fmt: skip
    if args.list:
        records = runner.records()
        for arm in arms:
            record = records.get(arm.name)
            print(f"{arm.group:18} {arm.name:26} {record.status if record else '-':9} {arm.title}")
        return 0
    runner.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

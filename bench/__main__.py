"""`python -m bench [FIGURE…]`: measure the named figures, or all of them and then write the README's table."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench import core, deploy, deploy_serving, deploy_tables, durability, keras, models, report, tables
from bench.harness import ENVIRONMENT, BenchError, Fleet

FIGURES = core.FIGURES | tables.FIGURES | durability.FIGURES | keras.FIGURES | models.FIGURES
FIGURES |= deploy.FIGURES | deploy_serving.FIGURES | deploy_tables.FIGURES
HOME = Path(__file__).resolve().parent.parent
README = HOME / "README.md"


def measure(name: str, machine: str) -> report.Result:
    """Measure one figure, printing what a person wants to see, then its line of JSON."""
    what, unit, figure = FIGURES[name]
    print(f"{name}: {what}\n  {machine}", flush=True)
    start = time.perf_counter()
    try:
        with Fleet() as fleet:
            checks, beside = figure(fleet)
        result = report.Result(name, what, unit, checks, beside)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        print(error)
        result = report.Result(name, what, unit, error=str(error))
    for check in result.checks:
        print(f"  {check.name:<60} {check.rounded:>9g}  {check.target:<8} {'holds' if check.holds else 'SHORT'}")
    print(f"  {time.perf_counter() - start:.0f} s" + (f"; short: {result.reason}" if not result.holds else ""))
    print(result.json(), flush=True)
    return result


def main(names: list[str]) -> int:
    """Returns 0 when everything asked for was measured, whether or not it meets its target."""
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        print(f"Expected figures among {', '.join(FIGURES)}, got {', '.join(unknown)}.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.path.append(str(HOME / "examples"))  # inherited as what follows
    os.environ.update(ENVIRONMENT, HEADWATER_TOKEN=secrets.token_hex(16))  # inherited by every process of the run
    machine = report.machine()
    try:
        results = [measure(name, machine) for name in names or FIGURES]
    except KeyboardInterrupt:
        print("Stopped; nothing is left running.", file=sys.stderr)
        return 130
    if not names:
        README.write_text(report.insert(README.read_text(), report.table(results, machine)))
        print(f"The table is in {README.name}.")
    return 1 if any(result.error for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

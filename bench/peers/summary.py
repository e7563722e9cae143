"""Figures of runs of compare.py as a Markdown table, a figure per run in each cell.

    summary.py RUN.json [RUN2.json …]
"""

import argparse
import json
from pathlib import Path

from run_rows import EXACT, RunRows

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def cell(figures):
    return ", ".join("–" if f is None else f"{f:.2f}" for f in figures) if any(figures) else "–"


def table(runs):
    """Times as fast as the best of the others, and our other members with float32 over our own float32."""
    members = list(dict.fromkeys(m for run in runs for m in run.members if m != EXACT))
    heads = ["shape", *DTYPES.values(), *(f"{m} over own float32" for m in members)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for shape, variant in dict.fromkeys(case[:2] for run in runs for case in run.cases):
        cells = [shape if variant == "dense" else f"{shape}, {variant}"]
        cells += [cell([run.over_best_peer((shape, variant, dtype)) for run in runs]) for dtype in DTYPES]
        cells += [cell([run.over_own_float32((shape, variant, "fp32"), m) for run in runs]) for m in members]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ceilings(documents):
    """One line, or none where no run has them."""
    rates = [document.get("ceilings", {}) for document in documents]
    names = dict.fromkeys(name for of_run in rates for name in of_run)
    figures = [f"{name} {', '.join(f'{r[name]:.0f}' if name in r else '–' for r in rates)}" for name in names]
    return ["", "ceilings, GFLOP/s: " + "; ".join(figures)] if figures else []


def summary(documents):
    return "\n".join(table([RunRows(document["rows"]) for document in documents]) + ceilings(documents))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, help="what compare.py --json wrote")
    print(summary([json.loads(path.read_text()) for path in parser.parse_args().run]))


if __name__ == "__main__":
    main()

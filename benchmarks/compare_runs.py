r"""Compares the runs of a benchmark from its runs.csv alone.

    python benchmarks/compare_runs.py documentation/data/few_label_methods.csv --reference stc3d --figure OUT.png

Prints Markdown tables: mean, difference to the reference paired by seed with Student's t interval over seeds, p-value
of a paired t-test corrected by Benjamini and Hochberg, and the runs themselves. Cases are not in the file, so that
intervals are over seeds only.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from nnssl_stc3d.evaluation.benchmark.figures import difference_bars
from nnssl_stc3d.evaluation.benchmark.statistics import Result, Row, compare, corrected, t_interval
from nnssl_stc3d.evaluation.benchmark.tables import signed


def read(file: Path) -> list[Result]:
    """Dice of the runs, each as one case."""
    with open(file, encoding="utf-8", newline="") as opened:
        lines = [line for line in csv.DictReader(opened) if line["score"] == "Dice"]
    names = [name for name in lines[0] if name not in ("score", "method", "finetuning", "labels", "seed", "mean")]
    return [
        Result(r["method"], r["finetuning"], int(r["labels"]), int(r["seed"]), {"all": {n: float(r[n]) for n in names}})
        for r in lines
    ]


def table(rows: list[Row]) -> str:
    """One line for each number of labels and method."""
    reference = rows[0].reference
    names = list(rows[0].structures)
    head = [
        "Labels",
        "Method",
        "Seeds",
        "Dice",
        "95 % over seeds",
        *names,
        f"Against {reference}",
        "95 % over seeds",
        "p",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        mean = t_interval(row.per_seed)
        line = [str(row.labels), row.method, str(len(row.seeds)), f"{row.mean:.1f}"]
        line += [f"{mean[0]:.1f} to {mean[1]:.1f}" if mean else "-", *(f"{row.structures[n]:.1f}" for n in names)]
        span = row.difference_interval
        line += ["" if row.difference is None else signed(row.difference)]
        line += [f"{signed(span[0])} to {signed(span[1])}" if span else ""]
        line += ["" if row.p_adjusted is None else f"{row.p_adjusted:.3f}"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def runs_table(rows: list[Row]) -> str:
    """Every run: a line for each number of labels and method, a column for each seed."""
    seeds = sorted({seed for row in rows for seed in row.seeds})
    lines = [["Labels", "Method", *(f"seed {seed}" for seed in seeds)], ["---"] * (2 + len(seeds))]
    for row in rows:
        values = dict(zip(row.seeds, row.per_seed, strict=True))
        lines.append([str(row.labels), row.method, *(f"{values[s]:.1f}" if s in values else "" for s in seeds)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--reference", default="scratch")
    parser.add_argument("--figure", type=Path, help="PNG of the differences")
    args = parser.parse_args()
    rows = corrected(compare(read(args.file), args.reference))
    print(table(rows), runs_table(rows), sep="\n\n")
    if args.figure:
        args.figure.write_bytes(difference_bars(rows, "Dice"))


if __name__ == "__main__":
    main()

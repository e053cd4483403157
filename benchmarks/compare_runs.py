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
from nnssl_stc3d.evaluation.benchmark.tables import difference_cells


def read(file: Path, score: str) -> list[Result]:
    """A score of the runs, each as one case."""
    with open(file, encoding="utf-8", newline="") as opened:
        lines = [line for line in csv.DictReader(opened) if line["score"] == score]
    if not lines:
        raise SystemExit(f"{file} has no runs with the score {score}")
    names = [name for name in lines[0] if name not in ("score", "method", "finetuning", "labels", "seed", "mean")]
    return [
        Result(r["method"], r["finetuning"], int(r["labels"]), int(r["seed"]), {"all": {n: float(r[n]) for n in names}})
        for r in lines
    ]


def table(rows: list[Row], score: str) -> str:
    """One line for each number of labels, way of finetuning and method."""
    names = list(rows[0].structures)
    head = ["Labels", "Finetuning", "Method", "Seeds", score, "95 % over seeds", *names]
    head += [f"Against {rows[0].reference}", "95 % over seeds", "p"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        mean = t_interval(row.per_seed)
        line = [str(row.labels), row.schedule, row.method, str(len(row.seeds)), f"{row.mean:.1f}"]
        line += [f"{mean[0]:.1f} to {mean[1]:.1f}" if mean else "-", *(f"{row.structures[n]:.1f}" for n in names)]
        line += difference_cells(row)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def runs_table(rows: list[Row]) -> str:
    """Every run: a line for each number of labels, way of finetuning and method, a column for each seed."""
    seeds = sorted({seed for row in rows for seed in row.seeds})
    lines = [["Labels", "Finetuning", "Method", *(f"seed {seed}" for seed in seeds)], ["---"] * (3 + len(seeds))]
    for row in rows:
        values = dict(zip(row.seeds, row.per_seed, strict=True))
        shown = [f"{values[s]:.1f}" if s in values else "" for s in seeds]
        lines.append([str(row.labels), row.schedule, row.method, *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--reference", default="scratch")
    parser.add_argument("--score", default="Dice", help="such as 'NSD 1 mm' (default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="PNG of the differences")
    args = parser.parse_args()
    rows = corrected(compare(read(args.file, args.score), args.reference))
    print(table(rows, args.score), runs_table(rows), sep="\n\n")
    if args.figure:
        args.figure.write_bytes(difference_bars(rows, args.score))


if __name__ == "__main__":
    main()

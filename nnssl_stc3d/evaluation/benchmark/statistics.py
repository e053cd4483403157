"""Statistics of a benchmark: means and intervals over seeds and cases, and paired differences to a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from nnssl_stc3d.evaluation.benchmark.methods import SCRATCH

RESAMPLES = 10_000
CONFIDENCE = 0.95

Interval = tuple[float, float]


@dataclass(frozen=True)
class Result:
    """What one finished finetuning reached.

    Attributes:
        method: "scratch" or the pretraining's method.
        schedule: of the finetuning.
        labels: number of labelled cases.
        seed: of the run.
        scores: case -> structure -> Dice or another score in percent.
    """

    method: str
    schedule: str
    labels: int
    seed: int
    scores: Mapping[str, Mapping[str, float]]

    def case_means(self) -> NDArray[np.float64]:
        """Mean over the structures of each case in sorted order, shape (cases,)."""
        return np.array([np.mean(list(self.scores[case].values())) for case in sorted(self.scores)])


@dataclass(frozen=True)
class Row:
    """One method at one number of labels.

    Attributes:
        method: its name.
        schedule: of the finetuning.
        labels: number of labelled cases.
        seeds: of the runs that are finished.
        per_seed: mean score of each seed, percent.
        mean: over the seeds.
        interval: of the mean, by resampling seeds and cases; None for a single seed.
        structures: structure -> mean score.
        reference: method that it is compared with, such as "scratch".
        difference: to the reference, mean over the seeds that both have; None for the reference itself.
        difference_per_seed: for each of these seeds.
        difference_interval: Student's t over these seeds; None for fewer than two.
        p: of a paired t-test over these seeds; None for fewer than two.
        p_adjusted: the same after :func:`corrected`.
    """

    method: str
    schedule: str
    labels: int
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    mean: float
    interval: Interval | None
    structures: Mapping[str, float]
    reference: str
    difference: float | None = None
    difference_per_seed: tuple[float, ...] = ()
    difference_interval: Interval | None = None
    p: float | None = None
    p_adjusted: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the difference to the reference is, after correction."""
        return self.p_adjusted is not None and self.p_adjusted < 1 - CONFIDENCE


def compare(results: Sequence[Result], reference: str = SCRATCH) -> list[Row]:
    """One row for each schedule, number of labels and method, scratch first.

    A seed stands for everything that a repetition changes: the draw of labelled cases, the pretraining, initialisation
    and batches. So differences are tested over seeds, paired; cases of one seed are not independent of each other.

    Args:
        results: of finished runs on the same cases.
        reference: method that the others are compared with.

    Raises:
        ValueError: runs were evaluated on different cases.
    """
    if len({tuple(sorted(r.scores)) for r in results}) > 1:
        raise ValueError("the runs were evaluated on different cases; evaluate all of them on the same ones")
    groups: dict[tuple[str, int, str], dict[int, Result]] = {}
    for result in results:
        groups.setdefault((result.schedule, result.labels, result.method), {})[result.seed] = result
    order = list(dict.fromkeys(result.method for result in results))
    keys = sorted(groups, key=lambda k: (k[0], k[1], k[2] != SCRATCH, order.index(k[2])))
    return [_row(*key, groups[key], reference, groups.get((key[0], key[1], reference), {})) for key in keys]


def corrected(rows: Sequence[Row]) -> list[Row]:
    """Corrects the p-values of one table, by Benjamini and Hochberg, for the number of its comparisons."""
    tested = [row.p for row in rows if row.p is not None]
    adjusted = iter(stats.false_discovery_control(tested)) if tested else iter(())
    return [row if row.p is None else replace(row, p_adjusted=float(next(adjusted))) for row in rows]


def _row(
    schedule: str, labels: int, method: str, group: dict[int, Result], reference: str, others: dict[int, Result]
) -> Row:
    seeds = tuple(sorted(group))
    cases = np.stack([group[seed].case_means() for seed in seeds])
    per_seed = tuple(float(m) for m in cases.mean(axis=1))
    names = next(iter(group[seeds[0]].scores.values()))
    structures = {
        name: float(np.mean([case[name] for r in group.values() for case in r.scores.values()])) for name in names
    }
    interval = bootstrap_interval(cases)
    row = Row(method, schedule, labels, seeds, per_seed, float(np.mean(per_seed)), interval, structures, reference)
    pairs = [seed for seed in seeds if seed in others]
    if method == reference or not pairs:
        return row
    differences = tuple(float(np.mean(group[s].case_means() - others[s].case_means())) for s in pairs)
    return replace(
        row,
        difference=float(np.mean(differences)),
        difference_per_seed=differences,
        difference_interval=t_interval(differences),
        p=paired_p(differences),
    )


def bootstrap_interval(scores: NDArray[np.float64]) -> Interval | None:
    """Percentile interval of the mean, by resampling seeds and, for each of them, cases.

    Few resampled seeds vary less than seeds do: of three, intervals of 95 % would hold the mean in three of four cases.
    So their deviations from the mean are widened to Student's t.

    Args:
        scores: (seeds, cases).

    Returns:
        None for a single seed, whose spread says nothing about others.
    """
    seeds, cases = scores.shape
    if seeds < 2:
        return None
    quantile = (1 + CONFIDENCE) / 2
    wider = np.sqrt(seeds / (seeds - 1)) * stats.t.ppf(quantile, seeds - 1) / stats.norm.ppf(quantile)
    of_seeds = scores.mean(axis=1, keepdims=True)
    scores = scores + (wider - 1) * (of_seeds - of_seeds.mean())
    rng = np.random.default_rng(0)
    rows = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = rng.integers(cases, size=(RESAMPLES, 1, cases))
    means = np.mean(scores[rows, columns], axis=(1, 2))
    low, high = np.percentile(means, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> Interval | None:
    """Interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t-test of paired differences against 0; None for fewer than two, 1 where all are 0."""
    if len(differences) < 2:
        return None
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return 1.0 if np.isnan(p) else p

r"""How well does Alice find the same place in two volumes? Share of matches that lie in the same organ.

For preprocessed cases with labels whose maps of embeddings ``nnssl_stc3d embed`` has made. The labels are only looked
up, nothing is trained on them.

    nnssl_stc3d embed CHECKPOINT -d 4 -p nnUNetSmallPlans
    python benchmarks/correspondence.py nnUNet_preprocessed/Dataset004_Hippocampus -p nnUNetSmallPlans
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import blosc2
import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import stats
from tqdm import tqdm

from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.embeddings import EmbeddedGuides, embedding_folder
from nnssl_stc3d.data.guides import BodyRule, body_guides
from nnssl_stc3d.methods.alice import AliceConfig
from nnssl_stc3d.prepare.plans import read_plans
from nnssl_stc3d.views.correspondence import cell_centers, match_cells, match_points_by_body
from nnssl_stc3d.views.guide import Guide

POINTS = 64


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="nnUNet_preprocessed/DatasetXXX_Name")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument(
        "--pairs", type=int, default=200, help="ordered pairs of cases, drawn at random; all if there are fewer"
    )
    parser.add_argument("--search", nargs="+", type=float, default=[AliceConfig().search], help="shares")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def label_at(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Labels of the voxels nearest to points ``(T, 3)``."""
    z, y, x = np.clip(np.rint(points).astype(int), 0, np.array(labels.shape) - 1).T
    return labels[z, y, x]


def main() -> None:
    """Prints a table."""
    options = parse_arguments()
    plans = read_plans(options.dataset, options.plans)
    configuration = PlansManager(plans).get_configuration(options.configuration)
    folder = options.dataset / configuration.data_identifier
    cases = CaseDataset(folder, CaseDataset.list_identifiers(folder))
    body = body_guides(cases, BodyRule.of_plan(plans, configuration.configuration), print)
    guides = EmbeddedGuides(body, embedding_folder(folder))
    config = AliceConfig()
    searches: dict[str, float | None] = {"embeddings, everywhere": None}
    for share in options.search:
        searches[f"embeddings, within {share:g} of the body around the place"] = share
    rng = np.random.default_rng(options.seed)
    right: dict[str, list[np.ndarray]] = {name: [] for name in ("place in the body alone", *searches)}
    accepted: dict[str, list[np.ndarray]] = {name: [] for name in searches}
    # Few cases have fewer pairs than wanted: each counts once, or the intervals would be too narrow.
    pairs = rng.permutation(list(itertools.permutations(cases.identifiers, 2)))[: options.pairs]
    for names in tqdm(pairs, unit="pair"):
        query, key = (guides[name] for name in names)
        first, second = (np.asarray(blosc2.open(str(folder / f"{n}_seg.b2nd"), mode="r")[0]) for n in names)
        cells = labelled_cells(query, first, rng)
        points = cell_centers(query, cells)
        wanted = label_at(first, points)
        right["place in the body alone"].append(label_at(second, match_points_by_body(query, key, points)) == wanted)
        for name, search in searches.items():
            matches, good = match_cells(query, key, cells, config.max_cycle, config.min_score, search)
            right[name].append(label_at(second, cell_centers(key, matches)) == wanted)
            accepted[name].append(good)
    print(f"\n{len(cases.identifiers)} cases, {len(pairs)} ordered pairs, up to {POINTS} cells inside organs each\n")
    print("| | accepted | of these in the same organ | 95 % over pairs | of the rejected |\n|---|---|---|---|---|")
    for name, hits in right.items():
        keep = accepted.get(name, [np.ones(len(h), dtype=bool) for h in hits])
        print(f"| {name} | {np.concatenate(keep).mean():.0%} | {summary(hits, keep)} |")


def labelled_cells(guide: Guide, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some cells ``(T, 3)`` of the body whose centre lies in an organ."""
    cells = np.argwhere(guide.body)
    cells = cells[label_at(labels, cell_centers(guide, cells)) > 0]
    return cells[rng.permutation(len(cells))[:POINTS]]


def summary(hits: list[np.ndarray], keep: list[np.ndarray]) -> str:
    """Share of hits among what is kept, its interval over pairs, and the share among the rest."""
    shares = [h[k].mean() for h, k in zip(hits, keep, strict=True) if k.any()]
    half = stats.t.ppf(0.975, len(shares) - 1) * stats.sem(shares)
    every, kept = np.concatenate(hits), np.concatenate(keep)
    rest = f"{every[~kept].mean():.0%}" if not kept.all() else ""
    return f"{every[kept].mean():.0%} | {np.mean(shares) - half:.0%} to {np.mean(shares) + half:.0%} | {rest}"


if __name__ == "__main__":
    main()

"""What an inspection writes: figures, numbers, a table of places and a page that shows all of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from nnssl_stc3d.data.voxel_labels import UNKNOWN
from nnssl_stc3d.evaluation.inspection.cases import InspectedCases
from nnssl_stc3d.evaluation.inspection.curves import invariance_figure, spectrum_figure
from nnssl_stc3d.evaluation.inspection.invariance import STRENGTHS
from nnssl_stc3d.evaluation.inspection.pictures import neighbours_figure, similarity_figure, voxel_figure
from nnssl_stc3d.evaluation.inspection.places import Place
from nnssl_stc3d.evaluation.inspection.run import Inspection
from nnssl_stc3d.evaluation.page import picture, render_page, section

RESULTS, PAGE, PLACES = "results.json", "index.html", "neighbours.csv"
_COMMAND = "nnssl_stc3d inspect"
# Columns of the figure of neighbours.
_CASES_SHOWN = 4


@dataclass(frozen=True)
class About:
    """What the page says about the run.

    Attributes:
        title: headline.
        facts: name -> value.
        caveat: whether the cases were trained on.
        settings: everything that repeats the run, for results.json.
    """

    title: str
    facts: Mapping[str, str]
    caveat: str
    settings: Mapping[str, object]


def make_files(found: Inspection, cases: InspectedCases, about: About) -> dict[str, bytes]:
    """Name -> content of all files of an inspection."""
    parts = [part for part in (_spectrum, _invariance, _similarity, _voxels, _neighbours) if _has(found, part.__name__)]
    files: dict[str, bytes] = {}
    sections, verdicts = [], []
    for part in parts:
        name, title, note, verdict, table, png = part(found, cases)
        files[f"{name}.png"] = png
        sections.append(section(title, picture(png, title) + table, note))
        verdicts.append(verdict)
    if found.places:
        files[PLACES] = _csv(found.places, cases).encode()
    page = render_page(about.title, " ".join(v for v in verdicts if v), about.caveat, about.facts, sections)
    files[PAGE] = page.encode()
    files[RESULTS] = (json.dumps(_results(found, cases, about, sorted(files)), indent=1) + "\n").encode()
    return files


def is_own(results: bytes) -> bool:
    """Whether a results.json was written by an inspection."""
    try:
        content = json.loads(results)
    except (ValueError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and content.get("made_by") == _COMMAND


_Part = tuple[str, str, str, str, str, bytes]


def _has(found: Inspection, part: str) -> bool:
    held = {"_spectrum": "spectra", "_neighbours": "places"}.get(part, part.removeprefix("_"))
    return bool(getattr(found, held))


def _spectrum(found: Inspection, cases: InspectedCases) -> _Part:
    del cases
    spectra = found.spectra
    rows = [
        [name, f"{s.effective_rank:.1f}", str(s.directions_for_90), str(s.dimension)] for name, s in spectra.items()
    ]
    views = next(iter(spectra.values())).views
    note = (
        f"Eigenvalues of the covariance of {views} pooled embeddings of random views (the mean of each channel of the "
        "encoder's stages), each divided by their sum (STC3D Fig. 5). The effective rank is 1 if all embeddings lie on "
        "a line and the dimension if they spread evenly. A higher rank says that less has collapsed, not that the "
        "features are of use."
    )
    table = _table(["", "effective rank", "directions for 90 % of the variance", "dimension"], rows)
    verdict = "Effective rank " + ", ".join(f"{row[0]} {row[1]}" for row in rows) + "."
    return "spectrum", "Spectrum of the embeddings", note, verdict, table, spectrum_figure(spectra)


def _invariance(found: Inspection, cases: InspectedCases) -> _Part:
    del cases
    first = next(iter(found.invariance.values()))
    rows = [
        [name, *(f"{result.curves[kind].kept:.2f}" for kind in STRENGTHS), f"{result.crop:.2f}"]
        for name, result in found.invariance.items()
    ]
    note = (
        "Cosine of the pooled embedding of a region and of the same region turned, shifted or scaled (STC3D Eqs. 8, "
        f"9, 15), mean over {first.cases} cases with {first.regions} regions each; bands are 95 % intervals over "
        "cases. Dashed: another view at a random place of the same case, which is what random cropping calls a "
        "positive pair. Channels are centred and scaled by their spread over random views, so that 0 is no "
        "similarity. Kept: (cosine - random crop) / (1 - random crop), mean over the strengths; 1 is invariant, 0 no "
        "closer than a random crop."
    )
    if found.shrunk < 1:
        note += (
            f" Cases are small: in one of them views were shrunk to {found.shrunk:.0%} of their size so that the "
            "strongest transformations fit."
        )
    table = _table(["", *(f"kept under {kind}" for kind in STRENGTHS), "random crop"], rows)
    return "invariance", "Invariance", note, "", table, invariance_figure(found.invariance)


def _similarity(found: Inspection, cases: InspectedCases) -> _Part:
    case, voxel = found.reference
    upright = {
        name: replace(result, cosines=result.cosines.transpose(cases.axes)) for name, result in found.similarity.items()
    }
    image = cases.volume(case)[0].transpose(cases.axes)
    png = similarity_figure(image, np.array(cases.in_scan(voxel)), cases.in_scan(cases.spacing), upright)
    rows = [[name, f"{s.correlation:.2f}", f"{found.kept[name]:.1%}"] for name, s in found.similarity.items()]
    note = (
        f"Cosine of the voxel embedding at the cross ({_where(voxel, cases)} of {case}: {found.why}) and of every "
        f"place of the body, {cases.cell_mm:.1f} mm apart; and all places in a plane, coloured by their distance from "
        "the cross (PiMPiC Fig. 3, which compares patches). Spearman's correlation is -1 if the similarity falls with "
        "the distance."
    )
    table = _table(["", "correlation of cosine and distance", "energy kept by the map's directions"], rows)
    return "similarity", "Similarity to one place", note, "", table, png


def _voxels(found: Inspection, cases: InspectedCases) -> _Part:
    del cases
    drawn = found.drawn
    if drawn is None:
        raise ValueError("no cells were drawn")
    rows = [
        [name, _with_interval(v.purity, v.interval), f"{v.chance:.0%}", f"{v.silhouette:.2f}"]
        for name, v in found.voxels.items()
    ]
    groups = "label" if drawn.labelled else "octant of the body"
    note = (
        f"{len(drawn.groups)} voxels of {len(drawn.cells)} cases, "
        + (
            "as many of each label where there are enough, coloured by label. "
            if drawn.labelled
            else "coloured by position in the body, since nothing is labelled. "
        )
        + f"Agreement: share of the 10 most similar voxels of other cases that have the same {groups}, mean over "
        f"{groups}s and cases with a 95 % interval over cases. Distances in a t-SNE mean little; trust the numbers."
    )
    table = _table(["", "neighbours in other cases agree", "by chance", "silhouette"], rows)
    verdict = f"Neighbours in other cases have the same {groups}: "
    verdict += ", ".join(f"{name} {v.purity:.0%}" for name, v in found.voxels.items())
    verdict += f" (chance {next(iter(found.voxels.values())).chance:.0%})."
    return "voxels", "Voxel embeddings in a plane", note, verdict, table, voxel_figure(drawn, found.voxels)


def _neighbours(found: Inspection, cases: InspectedCases) -> _Part:
    case, voxel = found.reference
    others = list(dict.fromkeys(place.case for place in next(iter(found.places.values()))))[:_CASES_SHOWN]
    wanted = _label_at(found.labels.get(case), voxel)
    slices: dict[str, dict[str, np.ndarray]] = {}
    outlines: dict[str, dict[str, np.ndarray]] = {}
    scan_layers: dict[str, dict[str, float]] = {}
    grids = {name: grid for name in others if (grid := cases.scan_grid(name)) is not None}
    rows = []
    for model, places in found.places.items():
        best = {place.case: place for place in places if place.rank == 1}
        layers = {name: cases.in_scan(best[name].voxel)[0] for name in others}
        slices[model] = {name: cases.axial_image(name, layer) for name, layer in layers.items()}
        scan_layers[model] = {name: grid.to_scan(best[name].voxel)[0] for name, grid in grids.items()}
        if wanted:
            outlines[model] = {name: cases.axial(found.labels[name], layer) == wanted for name, layer in layers.items()}
        cosine, back = (float(np.mean([getattr(p, key) for p in best.values()])) for key in ("cosine", "way_back_mm"))
        row = [model, f"{cosine:.2f}", f"{back:.1f}"]
        rows.append(row + ([f"{sum(p.label == wanted for p in best.values())} of {len(best)}"] if wanted else []))
    at = np.array(cases.in_scan(voxel))
    png = neighbours_figure(
        (case, cases.axial_image(case, at[0]), at),
        slices,
        {model: [replace(p, voxel=cases.in_scan(p.voxel)) for p in places] for model, places in found.places.items()},
        cases.in_scan(cases.spacing),
        outlines if wanted else None,
        cases.axial(found.labels[case], at[0]) == wanted if wanted else None,
        scan_layers,
    )
    note = (
        f"Places of other cases whose voxel embedding is most similar to that of {_where(voxel, cases)} of {case} "
        f"({found.why}). Back: how far from the point the way back ends; a large distance says that the place is not "
        f"specific. All places are in {PLACES}."
    )
    if wanted:
        note += f" Outlined: {cases.label_names.get(wanted, f'label {wanted}')}, the label at the point."
    table = _table(
        ["best place of each case", "mean cosine", "mean way back (mm)", *(["same label"] if wanted else [])], rows
    )
    return "neighbours", "Nearest neighbours of a point in other cases", note, "", table, png


def _label_at(labels: np.ndarray | None, voxel: np.ndarray) -> int:
    """Label at a voxel, 0 if nothing is labelled there."""
    return 0 if labels is None else max(0, int(labels[tuple(np.round(voxel).astype(int))]))


def _where(voxel: np.ndarray, cases: InspectedCases) -> str:
    mm = np.asarray(voxel) * np.asarray(cases.spacing)
    return f"voxel {','.join(f'{v:.0f}' for v in voxel)} (z,y,x; {','.join(f'{v:.0f}' for v in mm)} mm)"


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.0%}" + (f" ({max(0.0, interval[0]):.0%} to {min(1.0, interval[1]):.0%})" if interval else "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(v)}</td>' for v in row[1:])}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _csv(places: Mapping[str, Sequence[Place]], cases: InspectedCases) -> str:
    """One line for each place: voxels of the preprocessed case, mm from the centre of its first, voxels of the scan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    grids = {name: cases.scan_grid(name) for name in cases.names}
    writer.writerow(
        ["network", "case", "rank", "z", "y", "x", "z_mm", "y_mm", "x_mm", "z_scan", "y_scan", "x_scan", "cosine",
         "way_back_mm", "label"]
    )  # fmt: skip
    for model, found in places.items():
        for place in found:
            mm = [f"{v * s:.2f}" for v, s in zip(place.voxel, cases.spacing)]
            grid = grids[place.case]
            scan = ["", "", ""] if grid is None else [f"{v:.1f}" for v in grid.to_scan(place.voxel)]
            label = "" if place.label in (None, UNKNOWN) else cases.label_names.get(place.label, "background")
            writer.writerow(
                [model, place.case, place.rank, *(f"{v:.1f}" for v in place.voxel), *mm, *scan, f"{place.cosine:.4f}",
                 f"{place.way_back_mm:.2f}", label]
            )  # fmt: skip
    return text.getvalue()


def _results(found: Inspection, cases: InspectedCases, about: About, files: list[str]) -> dict:
    case, voxel = found.reference
    held = {
        "spectrum": found.spectra,
        "invariance": found.invariance,
        "similarity": found.similarity,
        "voxels": found.voxels,
    }
    result = {name: {m: r.to_dict() for m, r in part.items()} for name, part in held.items() if part}  # type: ignore[attr-defined]
    if found.places:
        result["neighbours"] = {
            m: [{"case": p.case, "rank": p.rank, "voxel": p.voxel, "cosine": p.cosine, "way_back_mm": p.way_back_mm,
                 "label": p.label} for p in places]
            for m, places in found.places.items()
        }  # fmt: skip
    return {
        "made_by": _COMMAND,
        "files": files,
        **about.settings,
        "cases": cases.names,
        "reference": {"case": case, "voxel": [float(v) for v in voxel], "what": found.why},
        "cell_mm": cases.cell_mm,
        "energy_kept": found.kept,
        "view_scale_of_invariance": found.shrunk,
        **result,
    }

"""What was found, as text, as a table and as one figure."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnssl_stc3d.files import written_whole
from nnssl_stc3d.prepare.case import Channel
from nnssl_stc3d.prepare.checks import ADVICE, Problem
from nnssl_stc3d.prepare.scan import ScannedCase

TABLE_FILE = "prepare_cases.csv"
FIGURE_FILE = "prepare_report.png"
_SHOWN = 5
_BARS = 60
_COLUMNS = (
    "case", "status", "problems", "advice", "size_x", "size_y", "size_z", "spacing_x_mm", "spacing_y_mm",
    "spacing_z_mm", "orientation", "pixel_type", "modality", "MiB", "channel", "p0.5", "median", "p99.5", "source",
)  # fmt: skip


def status(case: ScannedCase) -> str:
    """What becomes of a case: "bad", "written before" or "new"."""
    return "bad" if case.problems else "written before" if case.known else "new"


def format_summary(cases: Sequence[ScannedCase], channels: Sequence[Channel], ignored: Counter[str]) -> str:
    """Text for the screen.

    Args:
        cases: all that were found.
        channels: of every case.
        ignored: files that are no volumes, by ending.
    """
    counts = Counter(status(c) for c in cases)
    names = ", ".join(c.nnunet_name for c in channels)
    lines = [
        f"{len(cases)} cases with {len(channels)} channel{'s' if len(channels) > 1 else ''} ({names}): "
        + ", ".join(f"{counts[key]} {key}" for key in ("new", "written before", "bad") if counts[key])
    ]
    headers = [c.header for c in cases if c.header is not None and len(c.header.size) == 3]
    if headers:
        rows = [("", "smallest", "median", "largest")]
        sizes, spacings = np.array([h.size for h in headers]), np.array([h.spacing for h in headers])
        extents = sizes * spacings
        for title, values, digits in (("voxels", sizes, 0), ("spacing mm", spacings, 3), ("extent mm", extents, 0)):
            for axis, letter in enumerate("xyz"):
                low, middle, high = np.percentile(values[:, axis], (0, 50, 100))
                rows.append((f"{title} {letter}", f"{low:.{digits}f}", f"{middle:.{digits}f}", f"{high:.{digits}f}"))
        for index, channel in enumerate(channels):
            seen = [c.intensity[index] for c in cases if len(c.intensity) > index]
            if seen:
                for title in ("low", "median", "high"):
                    values = np.array([getattr(i, title) for i in seen])
                    label = {"low": "0.5 %", "median": "50 %", "high": "99.5 %"}[title]
                    low, middle, high = np.nanpercentile(values, (0, 50, 100))
                    rows.append((f"{channel.name} {label}", f"{low:.4g}", f"{middle:.4g}", f"{high:.4g}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines += ["", *("  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for row in rows)]
        turned = Counter(h.orientation for h in headers).most_common()
        lines += ["", "orientation: " + ", ".join(f"{name or 'unknown'} {count}" for name, count in turned)]
        if len(turned) > 1:
            lines.append("  nnU-Net does not turn images: views and positions of these will not correspond by axes.")
        looked = sum(bool(c.intensity) for c in cases)
        lines.append(f"values: of {looked} of {len(cases)} cases")
    if ignored:
        lines.append("not volumes: " + ", ".join(f"{count} {name}" for name, count in ignored.most_common(8)))
    return "\n".join(lines)


def format_problems(problems: Sequence[Problem]) -> str:
    """Problems by kind, some of each by name, with what to do."""
    by_code: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_code[problem.code].append(problem)
    lines = []
    for code, several in sorted(by_code.items(), key=lambda item: -len(item[1])):
        lines.append(f"[{code}] {len(several)}: {ADVICE[code]}")
        lines += [f"  {problem}" for problem in several[:_SHOWN]]
        if len(several) > _SHOWN:
            lines.append(f"  and {len(several) - _SHOWN} more, see {TABLE_FILE}")
    return "\n".join(lines)


def write_report(folder: Path, title: str, cases: Sequence[ScannedCase], channels: Sequence[Channel]) -> list[Path]:
    """Writes table and figure, in place of those of an earlier run.

    Args:
        folder: is made if it is not there.
        title: of the figure.
        cases: all that were found.
        channels: of every case.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for case in cases:
        writer.writerows(_rows(case, channels))
    buffer = io.BytesIO()
    draw(title, cases, channels).savefig(buffer, format="png", dpi=110)
    result = []
    for name, content in ((TABLE_FILE, text.getvalue().encode()), (FIGURE_FILE, buffer.getvalue())):
        with written_whole(folder / name) as beside:
            beside.write_bytes(content)
        result.append(folder / name)
    return result


def _rows(case: ScannedCase, channels: Sequence[Channel]) -> list[list[object]]:
    problems = "; ".join(f"[{p.code}] {p}" for p in case.problems)
    if case.accepted:
        problems = "; ".join(filter(None, [problems, *(f"[{p.code}, accepted] {p}" for p in case.accepted)]))
    advice = "; ".join(dict.fromkeys(p.advice for p in case.problems))
    rows: list[list[object]] = []
    for index, channel in enumerate(channels[: max(1, len(case.found))]):
        found = case.found[index] if index < len(case.found) else None
        header = found.header.spatial() if found is not None and found.header is not None else None
        size = (*header.size, "", "", "")[:3] if header else ("", "", "")
        spacing = (*(round(s, 6) for s in header.spacing), "", "", "")[:3] if header else ("", "", "")
        values = case.intensity[index] if index < len(case.intensity) else None
        rows.append(
            [
                case.case.name, status(case), problems, advice, *size, *spacing,
                header.orientation if header else "", header.pixel_type if header else "",
                header.modality if header else "", round(found.bytes / 2**20, 3) if found else "", channel.name,
                *((values.low, values.median, values.high) if values else ("", "", "")),
                found.volume.id if found else "",
            ]
        )  # fmt: skip
    return rows


def draw(title: str, cases: Sequence[ScannedCase], channels: Sequence[Channel]) -> Figure:
    """One figure: sizes, spacings, values, orientations, and what is wrong.

    Args:
        title: above it.
        cases: all that were found.
        channels: of every case.
    """
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    counts = Counter(status(c) for c in cases)
    figure.suptitle(f"{title}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())), fontsize=12)
    headers = [c.header for c in cases if c.header is not None and len(c.header.size) == 3]
    sizes = np.array([h.size for h in headers]).reshape(-1, 3)
    spacings = np.array([h.spacing for h in headers]).reshape(-1, 3)
    for axis, values, name in ((axes[0, 0], sizes, "Size in voxels"), (axes[0, 1], spacings, "Spacing in mm")):
        for letter, marker, column in zip("xyz", "o^s", values.T):
            axis.plot(np.sort(column), np.arange(1, len(column) + 1), marker, ms=4, alpha=0.6, label=letter)
        axis.set(title=name, xlabel="up to this value", ylabel="cases")
        axis.legend(fontsize=8)
    extents = sizes * spacings
    axes[0, 2].plot(extents[:, :2].mean(1), extents[:, 2], "o", ms=4, alpha=0.6)
    axes[0, 2].set(title="Extent in mm", xlabel="x and y, mean", ylabel="z")
    _draw_values(axes[1, 0], cases, channels)
    _draw_counts(axes[1, 1], Counter(h.orientation or "unknown" for h in headers), "Orientation", "tab:blue")
    wrong = Counter(code for c in cases for code in {p.code for p in c.problems})
    _draw_counts(axes[1, 2], wrong, "What is wrong (cases)", "tab:red")
    return figure


def _draw_values(axis: Axes, cases: Sequence[ScannedCase], channels: Sequence[Channel]) -> None:
    """Range between the percentiles of each case that was looked at."""
    for index, channel in enumerate(channels):
        seen = [c.intensity[index] for c in cases if len(c.intensity) > index]
        seen = [seen[int(k)] for k in np.linspace(0, len(seen) - 1, min(_BARS, len(seen)))] if seen else []
        seen.sort(key=lambda i: i.median)
        places = np.arange(len(seen)) + 0.3 * index
        axis.vlines(places, [i.low for i in seen], [i.high for i in seen], colors=f"C{index}", lw=2, label=channel.name)
        axis.plot(places, [i.median for i in seen], "k_", ms=5)
    axis.set(title="Values: 0.5 to 99.5 %, median", xlabel=f"cases looked at, {_BARS} at most", ylabel="value")
    axis.legend(fontsize=8)


def _draw_counts(axis: Axes, counts: Counter[str], title: str, color: str) -> None:
    names = [name for name, _ in counts.most_common()][::-1]
    axis.barh(names, [counts[name] for name in names], color=color)
    axis.set(title=title, xlabel="cases")
    if not names:
        axis.text(0.5, 0.5, "nothing", ha="center", va="center", transform=axis.transAxes)
        axis.set_yticks([])

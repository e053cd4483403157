"""``nnssl_stc3d inspect``: what a pretrained network has learnt, in figures and numbers, without training anything."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nnssl_stc3d.cli.datasets import preprocessed_folder

DESCRIPTION = """\
Looks at the embeddings of one or more checkpoints, and of the untrained network, on preprocessed cases, and writes a
page (index.html), its figures and results.json. Parts:
  spectrum    eigenvalues of pooled embeddings and their effective rank (STC3D Fig. 5)
  invariance  similarity of a view and the same view turned, shifted or scaled, against a random crop (Eqs. 8, 9, 15)
  similarity  similarity of all places to one place, and their PCA coloured by distance (PiMPiC Fig. 3)
  voxels      voxels of several cases in PCA and t-SNE, coloured by label, and how often neighbours agree (vox2vec)
  neighbours  the places of other cases that are most similar to a point
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``inspect``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="checkpoint files or their results folders")
    add("-d", dest="dataset", required=True, help="dataset number or name, such as 4")
    add("-c", dest="configuration", default="3d_fullres", help="configuration (default: %(default)s)")
    add("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    add("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add("--parts", help="some of spectrum,invariance,similarity,voxels,neighbours (default: all)")
    add("--names", help="names of the checkpoints in figures, comma-separated (default: their methods)")
    add("--point", nargs=2, metavar=("CASE", "Z,Y,X"),
        help="a voxel of a preprocessed case, mm from its first voxel as Z,Y,Xmm, or a voxel of the scan as Z,Y,Xscan "
        "(default: the middle of the body of the first case)")  # fmt: skip
    add("--neighbours", type=int, default=3, help="best places in each other case (default: %(default)s)")
    add("--cases", type=int, default=12, help="cases at most (default: %(default)s)")
    add("--views", type=int, default=512, help="random views for the spectrum (default: %(default)s)")
    add("--points", type=int, default=2000, help="voxels in PCA and t-SNE (default: %(default)s)")
    add("--regions", type=int, default=4, help="regions of each case for the invariance (default: %(default)s)")
    add("--pyramid", choices=("auto", "encoder", "decoder"), default="auto",
        help="feature maps that voxels are read from (default: the decoder's if it was pretrained)")  # fmt: skip
    add("--embedding", choices=("features", "head"), default="features",
        help="voxel embedding: features of the network, or the method's own head (STC3D, vox2vec)")  # fmt: skip
    add("--width", type=int, default=128, help="principal directions of voxels that are kept (default: %(default)s)")
    add("--cell", type=float, metavar="MM", help="distance of the places that are compared (default: 1/64 of a case)")
    add("--no-scratch", action="store_true", help="leave out the untrained network")
    add("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: cuda if there is one")
    add("--overwrite", action="store_true", help="write into a folder that holds other files")
    return parser


def run(args: argparse.Namespace) -> int:
    """Checks everything, looks, and writes the folder."""
    from nnssl_stc3d.evaluation.inspection.command import Request, inspect_checkpoints
    from nnssl_stc3d.evaluation.inspection.options import PARTS, InspectOptions, Point
    from nnssl_stc3d.transfer.export import find_checkpoints

    options = InspectOptions(
        parts=tuple(dict.fromkeys(args.parts.replace(" ", "").split(","))) if args.parts else PARTS,
        pyramid=args.pyramid,
        embedding=args.embedding,
        point=Point.parse(*args.point) if args.point else None,
        max_cases=args.cases,
        views=args.views,
        points=args.points,
        regions=args.regions,
        neighbours=args.neighbours,
        width=args.width,
        cell_mm=args.cell,
        scratch=not args.no_scratch,
        seed=args.seed,
    )
    folder = preprocessed_folder(args.dataset)
    request = Request(
        files=[_single(find_checkpoints(path), path) for path in args.checkpoints],
        names=args.names.split(",") if args.names else None,
        dataset=folder,
        plans=_read(folder / f"{args.plans}.json", "plans; give their name with -p"),
        configuration=args.configuration,
        output=args.output,
        overwrite=args.overwrite,
        device=args.device,
    )
    page = inspect_checkpoints(request, options)
    print(f"Wrote {page}")
    return 0


def _single(found: list[Path], source: Path) -> Path:
    if len(found) > 1:
        raise ValueError(f"expected one checkpoint in {source}, found {len(found)}. Name the file.")
    return found[0]


def _read(file: Path, what: str) -> dict[str, Any]:
    if not file.is_file():
        there = ", ".join(sorted(p.stem for p in file.parent.glob("*lans*.json"))) or "none"
        raise ValueError(f"expected {what}: {file} is not there, found {there}.")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content

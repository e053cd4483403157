"""``nnssl_stc3d small-plans``: derives plans that train in minutes on a CPU."""

from __future__ import annotations

import argparse
import json

from nnssl_stc3d.cli.datasets import preprocessed_folder
from nnssl_stc3d.prepare.plans import SmallPlansConfig, write_small_plans


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``small-plans``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "small-plans",
        description="Derives a CPU-sized plans file from nnU-Net's plans. The preprocessed data is shared with "
        "the original plans.",
    )
    small = SmallPlansConfig()
    parser.add_argument("-d", dest="dataset", required=True, help="dataset number or name, such as 802")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans to start from (default: %(default)s)")
    parser.add_argument(
        "-o", dest="output", default="nnUNetSmallPlans", help="name of the new plans (default: %(default)s)"
    )
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="configuration (default: %(default)s)")
    parser.add_argument(
        "--base-features",
        type=int,
        default=small.base_features,
        help="channels of the first stage (default: %(default)s)",
    )
    parser.add_argument(
        "--max-features", type=int, default=small.max_features, help="channels at most (default: %(default)s)"
    )
    parser.add_argument(
        "--patch-size", type=int, nargs=3, metavar=("Z", "Y", "X"), help="patch in voxels (default: that of the plans)"
    )
    parser.add_argument(
        "--max-patch-voxels",
        type=int,
        metavar="N",
        help="instead of --patch-size: shrink the patch to N voxels at most",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="patches in a batch (default: that of the plans)")
    parser.add_argument("--stages", type=int, metavar="N", help="keep at most N encoder stages (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file of that name")
    return parser


def run(args: argparse.Namespace) -> int:
    """Writes the plans and says what is in them."""
    folder = preprocessed_folder(args.dataset)
    small = SmallPlansConfig(
        base_features=args.base_features,
        max_features=args.max_features,
        patch_size=tuple(args.patch_size) if args.patch_size else None,
        max_patch_voxels=args.max_patch_voxels,
        batch_size=args.batch_size,
        stages=args.stages,
    )
    file = write_small_plans(folder, args.plans, args.output, args.configuration, small, args.overwrite)
    written = json.loads(file.read_text(encoding="utf-8"))["configurations"][args.configuration]
    print(f"Wrote {file}")
    print(
        f"{args.configuration}: features {written['architecture']['arch_kwargs']['features_per_stage']}, patch "
        f"{written['patch_size']}, "
        f"batch {written['batch_size']}, data {written['data_identifier']}"
    )
    print(f"Use it with: -p {args.output}")
    return 0

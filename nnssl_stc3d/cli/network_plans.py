"""``nnssl_stc3d network-plans``: derives plans that name another network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nnssl_stc3d.cli.datasets import preprocessed_folder
from nnssl_stc3d.prepare.fpn_plans import write_fpn_plans
from nnssl_stc3d.prepare.transformer_plans import PRIMUS_SIZES, write_transformer_plans

DESCRIPTION = """\
Derives a plans file that names another network from nnU-Net's plans. Spacing, normalisation and the preprocessed data
stay. Stock nnUNetTrainer and nnUNetv2_predict use the network wherever this package is installed.

networks:
  fpn         vox2vec's feature pyramid network with the stages and widths of the plans
  fpn-paper   the same as vox2vec was published: 6 levels of 16 to 512 channels, BatchNorm, ReLU
  primus      the transformer that nnU-Net ships, in its sizes S, B, M and L; patches are multiples of 8
  swin-unetr  MONAI's Swin-UNETR with 48 features (pip install 'nnssl_stc3d[monai]'); patches are multiples of 32

PlainConvUNet is what nnU-Net plans by default, and ResEnc M, L and XL are planners of its own:
  nnUNetv2_plan_experiment -d 801 -pl nnUNetPlannerResEncL
"""
# Name of a network and the plans that are written by default.
NETWORKS = {
    "fpn": "nnUNetFPNPlans",
    "fpn-paper": "nnUNetFPNPaperPlans",
    "primus": "nnUNetPrimus{size}Plans",
    "swin-unetr": "nnUNetSwinUNETRPlans",
}
DEFAULT_SIZE = "S"


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``network-plans``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "network-plans", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", dest="dataset", required=True, help="dataset number or name, such as 801")
    parser.add_argument("--network", required=True, choices=NETWORKS)
    parser.add_argument("--size", choices=PRIMUS_SIZES, help=f"size of primus (default: {DEFAULT_SIZE})")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans to start from (default: %(default)s)")
    parser.add_argument("-o", dest="output", help="name of the new plans (default: from the network's name)")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="configuration (default: %(default)s)")
    parser.add_argument(
        "--patch-size",
        type=int,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="patch of a transformer in voxels (default: that of the plans)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file of that name")
    return parser


def run(args: argparse.Namespace) -> int:
    """Writes the plans and says what is in them."""
    folder = preprocessed_folder(args.dataset)
    name = args.output or NETWORKS[args.network].format(size=args.size or DEFAULT_SIZE)
    file = _write(args, folder, name)
    written = json.loads(file.read_text(encoding="utf-8"))["configurations"][args.configuration]
    architecture = written["architecture"]
    kwargs = architecture["arch_kwargs"]
    width = next(f"{key} {kwargs[key]}" for key in ("features_per_stage", "embed_dim", "feature_size") if key in kwargs)
    print(f"Wrote {file}")
    print(
        f"{args.configuration}: {architecture['network_class_name']}, {width}, patch {written['patch_size']}, data "
        f"{written['data_identifier']}"
    )
    print(f"Use it with: -p {name}")
    return 0


def _write(args: argparse.Namespace, folder: Path, name: str) -> Path:
    options: dict[str, Any] = {"configuration": args.configuration}
    if args.network.startswith("fpn"):
        if args.size or args.patch_size:
            raise ValueError(f"--size and --patch-size are for transformers, got --network {args.network}.")
        paper = args.network == "fpn-paper"
        return write_fpn_plans(folder, args.plans, name, args.overwrite, paper=paper, **options)
    options |= {"size": args.size, "patch_size": args.patch_size}
    return write_transformer_plans(folder, args.plans, name, args.network, args.overwrite, **options)

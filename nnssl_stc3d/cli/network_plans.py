"""``nnssl_stc3d network-plans``: derives plans that name another network."""

from __future__ import annotations

import argparse
import json

from nnssl_stc3d.cli.datasets import preprocessed_folder
from nnssl_stc3d.prepare.fpn_plans import write_fpn_plans

DESCRIPTION = """\
Derives a plans file that names another network from nnU-Net's plans. Patch, spacing, normalisation and the preprocessed
data stay. Stock nnUNetTrainer and nnUNetv2_predict use the network wherever this package is installed.

networks:
  fpn        vox2vec's feature pyramid network with the stages and widths of the plans
  fpn-paper  the same as vox2vec was published: 6 levels of 16 to 512 channels, BatchNorm, ReLU
"""
# Name of a network, the plans that are written by default, and its options.
NETWORKS = {"fpn": ("nnUNetFPNPlans", {"paper": False}), "fpn-paper": ("nnUNetFPNPaperPlans", {"paper": True})}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``network-plans``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "network-plans", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", dest="dataset", required=True, help="dataset number or name, such as 801")
    parser.add_argument("--network", required=True, choices=NETWORKS)
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans to start from (default: %(default)s)")
    parser.add_argument("-o", dest="output", help="name of the new plans (default: from the network's name)")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="configuration (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file of that name")
    return parser


def run(args: argparse.Namespace) -> int:
    """Writes the plans and says what is in them."""
    default, options = NETWORKS[args.network]
    name = args.output or default
    folder = preprocessed_folder(args.dataset)
    file = write_fpn_plans(folder, args.plans, name, args.overwrite, configuration=args.configuration, **options)
    written = json.loads(file.read_text(encoding="utf-8"))["configurations"][args.configuration]
    architecture = written["architecture"]
    print(f"Wrote {file}")
    print(
        f"{args.configuration}: {architecture['network_class_name']}, features "
        f"{architecture['arch_kwargs']['features_per_stage']}, patch {written['patch_size']}, data "
        f"{written['data_identifier']}"
    )
    print(f"Use it with: -p {name}")
    return 0

"""``nnssl_stc3d embed``: voxel embeddings of all cases, by which Alice finds the same place in two volumes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nnssl_stc3d.cli.datasets import preprocessed_folder

DESCRIPTION = """\
Embeds all preprocessed cases of a dataset with a pretraining that contrasts voxels (Vox2VecPretrainTrainer or
STC3DPretrainTrainer), at about 4 mm. AlicePretrainTrainer finds corresponding crops of two volumes by these maps. They
lie beside the preprocessed data, in a folder whose name ends in _embeddings.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``embed``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "embed", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint file or its results folder")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset number or name, such as 801")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="configuration (default: %(default)s)")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=32, help="width of the embeddings that are kept (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: cuda if there is one, else cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace maps of other plans, width or checkpoint")
    return parser


def run(args: argparse.Namespace) -> int:
    """Makes the maps and says what they are for."""
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl_stc3d.data.embeddings import EmbeddingRecord
    from nnssl_stc3d.evaluation.voxel_embeddings import embed_cases, load_embedder, sha256
    from nnssl_stc3d.training.preflight import check_configuration
    from nnssl_stc3d.transfer.checkpoint import load_checkpoint
    from nnssl_stc3d.transfer.differences import PlansReference, describe_plans
    from nnssl_stc3d.transfer.export import find_checkpoints

    if args.width < 1:
        raise ValueError(f"--width must be positive, got {args.width}")
    folder = preprocessed_folder(args.dataset)
    file = folder / f"{args.plans}.json"
    if not file.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*lans*.json"))) or "none"
        raise ValueError(f"expected plans {file}, found {there}. Give their name with -p.")
    plans = json.loads(file.read_text(encoding="utf-8"))
    check_configuration(plans, args.configuration, "embed")
    configuration = PlansManager(plans).get_configuration(args.configuration)
    (path, *others) = find_checkpoints(args.checkpoint)
    if others:
        raise ValueError(f"expected one checkpoint in {args.checkpoint}, found {len(others) + 1}. Name the file.")
    checkpoint = load_checkpoint(path, pretraining=True)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    z, y, x = (float(s) for s in configuration.spacing)
    pretrained = [float(s) for s in _spacing(checkpoint)]
    if max(abs(a / b - 1) for a, b in zip(pretrained, (z, y, x))) > 0.1:
        print(f"WARNING: the checkpoint was pretrained at {pretrained} mm, these cases have {[z, y, x]} mm.")
    trained, given = (
        describe_plans(PlansReference(*side)).get("normalisation")
        for side in ((checkpoint["plans"], checkpoint["configuration"]), (plans, args.configuration))
    )
    if trained != given:
        print(f"WARNING: the checkpoint was pretrained with the normalisation {trained}, these cases have {given}.")
    record = EmbeddingRecord(
        plans=args.plans,
        configuration=args.configuration,
        spacing=(z, y, x),
        checkpoint=str(path),
        checkpoint_sha256=sha256(path),
        method=checkpoint["method"]["name"],
        width=args.width,
    )
    command = f"nnssl_stc3d embed {path} -d {args.dataset} -c {args.configuration} -p {args.plans}"
    embedder = load_embedder(checkpoint, device)
    written = embed_cases(embedder, folder / configuration.data_identifier, plans, record, command, args.overwrite)
    usage = f"nnUNetv2_train {args.dataset} {args.configuration} all -tr AlicePretrainTrainer -p {args.plans}"
    print(f"Wrote {written}\nUse it with: {usage}")
    return 0


def _spacing(checkpoint: dict) -> list[float]:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return list(PlansManager(checkpoint["plans"]).get_configuration(checkpoint["configuration"]).spacing)

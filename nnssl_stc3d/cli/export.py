"""``nnssl_stc3d export``: a checkpoint in a form for use elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("nnunet", "safetensors", "stock-trainer")
DESCRIPTION = """\
Writes a checkpoint in a form for use elsewhere:

  nnunet         from a pretraining: weights, plans, dataset.json, method and versions without heads and optimiser, for
                 nnUNetv2_train -pretrained_weights with or without this package (OUT ends in .pth)
  safetensors    from a pretraining: the encoder alone as plain tensors (OUT ends in .safetensors)
  stock-trainer  from a finetuned model: the model under the name of nnU-Net's own trainer, so that nnUNetv2_predict
                 needs no extension (OUT is the folder in which nnUNetTrainer__PLANS__CONFIGURATION is made)
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``export``."""
    parser = subparsers.add_parser(
        "export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint file or its results folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="file or folder to write")
    parser.add_argument("--format", choices=FORMATS, default="nnunet", help="default: %(default)s")
    parser.add_argument(
        "--channels", type=int, help="nnunet only: adapt the first convolution to this number of input channels"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    return parser


def run(args: argparse.Namespace) -> int:
    """Exports and prints what can be done with the result."""
    from nnssl_stc3d.transfer.export import export_nnunet, export_safetensors, export_stock_trainer

    if args.channels is not None and args.format != "nnunet":
        raise ValueError(f"--channels belongs to --format nnunet, got --format {args.format}. Leave it out.")
    if args.format == "nnunet":
        written = export_nnunet(args.checkpoint, args.output, channels=args.channels, overwrite=args.overwrite)
        usage = f"nnUNetv2_train DATASET CONFIGURATION FOLD -p PLANS -pretrained_weights {written}"
    elif args.format == "safetensors":
        written = export_safetensors(args.checkpoint, args.output, overwrite=args.overwrite)
        usage = f'safetensors.torch.load_file("{written}")'
    else:
        written = export_stock_trainer(args.checkpoint, args.output, overwrite=args.overwrite)
        folds = " ".join(sorted(folder.name.removeprefix("fold_") for folder in written.glob("fold_*")))
        usage = f"nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {written} -f {folds}"
    print(f"Wrote {written}\nUse it with: {usage}")
    return 0

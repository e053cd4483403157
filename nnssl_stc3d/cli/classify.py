"""``nnssl_stc3d classify``: classes of new scans by a model of STC3DClassifyTrainer."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Classifies the scans of a folder (named as for nnUNetv2_predict: CASE_0000.nii.gz, CASE_0001.nii.gz, ..) with a model
that `nnUNetv2_train -tr STC3DClassifyTrainer` made. The scans are preprocessed as nnU-Net does it, and the
probabilities of the folds are averaged. The result is a table with the predicted class and all probabilities.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``classify``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "classify", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL_FOLDER", help="results folder STC3DClassifyTrainer__PLANS__CONFIGURATION"
    )
    parser.add_argument("-i", dest="input", type=Path, required=True, metavar="FOLDER", help="folder of the scans")
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE.csv", help="table to write")
    parser.add_argument("-f", dest="folds", nargs="+", metavar="FOLD", help="folds to average (default: all there are)")
    parser.add_argument(
        "-chk", dest="checkpoint", default="checkpoint_final.pth", help="checkpoint of each fold (default: %(default)s)"
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE.csv", help="true classes (columns case and label): prints the measures"
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: cuda if there is one, else cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace the table if it exists")
    return parser


def run(args: argparse.Namespace) -> int:
    """Writes the table, and prints the measures if labels are given."""
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists. Give another name or --overwrite.")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"The folder of {args.output} does not exist. Create it first.")

    import torch

    from nnssl_stc3d.data.case_labels import read_case_labels
    from nnssl_stc3d.evaluation.classification import Classifier, find_scans
    from nnssl_stc3d.training.classification_metrics import classification_metrics, metrics_table, write_predictions

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classifier = Classifier(args.model, args.folds, args.checkpoint, device)
    truth: dict[str, int] = {}
    if args.labels:
        scans = find_scans(args.input, classifier.dataset_json["file_ending"], classifier.channels)
        table = read_case_labels(args.labels, set(scans), min_classes=1)
        if unknown := [name for name in table.classes if name not in classifier.classes]:
            raise ValueError(
                f"{args.labels} has the class {unknown[0]}, the model knows {', '.join(classifier.classes)}."
            )
        truth = {case: classifier.classes.index(table.classes[index]) for case, index in table.labels.items()}
    cases, probabilities = classifier.classify_folder(args.input)
    write_predictions(args.output, cases, probabilities, classifier.classes)
    print(f"Wrote {args.output}: {len(cases)} scans, averaged over {len(classifier.files)} folds")
    if truth:
        known = [index for index, case in enumerate(cases) if case in truth]
        metrics = classification_metrics([truth[cases[i]] for i in known], probabilities[known], classifier.classes)
        print(metrics_table(metrics))
    return 0

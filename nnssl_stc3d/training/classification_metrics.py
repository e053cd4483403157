"""How good a classification is, and the files that say so."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score, roc_auc_score

from nnssl_stc3d.transfer.checkpoint import write_atomically


def classification_metrics(truth: Sequence[int], probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Measures of a classification.

    Args:
        truth: index of the class of each case.
        probabilities: ``(N, K)``.
        classes: K names.

    Returns:
        ``accuracy``; ``balanced_accuracy``, the mean recall of the classes that occur; ``auc``, the mean of the areas
        under the curves of one class against the rest, over the classes for which it is defined, None if for none;
        ``f1``, the mean over the classes that occur or are predicted; ``confusion_matrix``, rows are the truth.
    """
    expected, predicted = np.asarray(truth), probabilities.argmax(1)
    occurring = sorted(set(expected.tolist()))
    defined = [k for k in occurring if len(occurring) > 1]
    areas = [float(roc_auc_score(expected == k, probabilities[:, k])) for k in defined]
    return {
        "cases": len(expected),
        "accuracy": float(accuracy_score(expected, predicted)),
        "balanced_accuracy": float(
            recall_score(expected, predicted, labels=occurring, average="macro", zero_division=0)
        ),
        "auc": float(np.mean(areas)) if areas else None,
        "f1": float(f1_score(expected, predicted, average="macro", zero_division=0)),
        "classes": list(classes),
        "confusion_matrix": confusion_matrix(expected, predicted, labels=range(len(classes))).tolist(),
    }


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The measures and the confusion matrix as lines of text."""
    names = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auc": "AUC", "f1": "F1"}
    lines = [
        f"{name}: {'not defined, one class only' if metrics[key] is None else format(metrics[key], '.4f')}"
        for key, name in names.items()
    ]
    width = max(len(name) for name in metrics["classes"]) + 2
    lines.append("confusion matrix (rows: truth, columns: predicted " + ", ".join(metrics["classes"]) + "):")
    for name, row in zip(metrics["classes"], metrics["confusion_matrix"]):
        lines.append(f"  {name:<{width}}" + " ".join(f"{count:>5}" for count in row))
    return "\n".join([f"{metrics['cases']} cases", *lines])


def write_predictions(
    file: Path,
    cases: Sequence[str],
    probabilities: np.ndarray,
    classes: Sequence[str],
    truth: Sequence[int] | None = None,
) -> None:
    """Write a CSV: case, label if known, predicted, and the probability of each class.

    Args:
        file: destination; complete on disk before it takes its name.
        cases: N identifiers.
        probabilities: ``(N, K)``.
        classes: K names.
        truth: index of the class of each case, if known.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["case", *(["label"] if truth is not None else []), "predicted", *(f"p_{c}" for c in classes)])
    for index, (case, row) in enumerate(zip(cases, probabilities)):
        known = [classes[truth[index]]] if truth is not None else []
        writer.writerow([case, *known, classes[int(row.argmax())], *(f"{p:.6f}" for p in row)])
    write_atomically(file, lambda opened: opened.write(text.getvalue().encode()))

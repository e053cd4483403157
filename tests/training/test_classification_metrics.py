"""Measures of a classification, by hand and against scikit-learn."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from nnssl_stc3d.training.classification_metrics import classification_metrics, metrics_table, write_predictions


def test_two_classes_by_hand():
    positive = np.array([0.1, 0.4, 0.6, 0.7, 0.3, 0.9])
    truth = [0, 0, 0, 1, 1, 1]
    found = classification_metrics(truth, np.stack([1 - positive, positive], 1), ["no", "yes"])
    assert found["confusion_matrix"] == [[2, 1], [1, 2]]
    assert found["accuracy"] == pytest.approx(4 / 6) and found["balanced_accuracy"] == pytest.approx(4 / 6)
    # 7 of the 9 pairs of a positive and a negative are in order.
    assert found["auc"] == pytest.approx(7 / 9)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["cases"] == 6 and found["classes"] == ["no", "yes"]


def test_classes_of_different_numbers_by_hand():
    """Everything is taken for b, of which there is one case."""
    found = classification_metrics([0, 0, 1], np.array([[0.1, 0.9]] * 3), ["a", "b"])
    # Rows are what is true, columns what was found.
    assert found["confusion_matrix"] == [[0, 2], [0, 1]]
    assert found["accuracy"] == pytest.approx(1 / 3) and found["balanced_accuracy"] == 0.5


def test_several_classes_against_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.choice(4, size=60, p=[0.5, 0.3, 0.1, 0.1])
    truth[:4] = range(4)
    probabilities = rng.dirichlet(np.ones(4), size=60)
    found = classification_metrics(truth.tolist(), probabilities, list("abcd"))
    predicted = probabilities.argmax(1)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert found["f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    expected = roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    assert found["auc"] == pytest.approx(expected)
    assert np.sum(found["confusion_matrix"]) == 60


def test_classes_that_do_not_occur(recwarn):
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.2, 0.7, 0.1]])
    found = classification_metrics([0, 1, 1], probabilities, ["a", "b", "c"])
    # Recall of a is 1, of b 1/2; areas of a and b are both 1.
    assert found["balanced_accuracy"] == 0.75
    assert found["auc"] == pytest.approx(np.mean([1.0, 1.0]))
    single = classification_metrics([1, 1, 1], probabilities, ["a", "b", "c"])
    assert single["auc"] is None and "AUC: not defined, one class only" in metrics_table(single)
    assert not recwarn.list


def test_the_table_names_the_classes():
    found = classification_metrics([0, 1], np.eye(2), ["healthy", "sick"])
    lines = metrics_table(found).splitlines()
    assert "balanced accuracy: 1.0000" in lines
    assert [line.split() for line in lines[-2:]] == [["healthy", "1", "0"], ["sick", "0", "1"]]


def test_predictions_are_written_with_probabilities(tmp_path):
    probabilities = np.array([[0.25, 0.75], [0.5, 0.5]])
    write_predictions(tmp_path / "a.csv", ["x", "y, z"], probabilities, ["no", "yes"])
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["case", "predicted", "p_no", "p_yes"],
        ["x", "yes", "0.250000", "0.750000"],
        ["y, z", "no", "0.500000", "0.500000"],
    ]
    write_predictions(tmp_path / "b.csv", ["x"], probabilities[:1], ["no", "yes"], truth=[0])
    assert (tmp_path / "b.csv").read_text(encoding="utf-8").splitlines()[1].split(",")[:3] == ["x", "no", "yes"]

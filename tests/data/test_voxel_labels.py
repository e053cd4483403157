"""Label maps beside preprocessed images."""

from __future__ import annotations

import blosc2
import numpy as np

from nnssl_stc3d.data.voxel_labels import anatomical_labels, ignored_value, label_file, read_structures


def test_labels_of_regions_ignored_voxels_and_body_masks():
    assert anatomical_labels({"labels": {"background": 0, "body": 1}}) == {}
    assert anatomical_labels({"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}}) == {
        1: "whole",
        2: "core",
    }
    # The middle of a pancreas or a hippocampus is no mask of the body.
    parts = {"background": 0, "head": 1, "body": 2, "tail": 3}
    assert anatomical_labels({"labels": parts}) == {1: "head", 2: "body", 3: "tail"}
    assert ignored_value({"labels": {"background": 0, "ignore": 3}}) == 3
    assert ignored_value({"labels": {"background": 0, "liver": 1}}) is None


def test_structures_background_and_what_nobody_has_labelled(tmp_path):
    labels = np.array([-1, 0, 1, 2, 3, 4], dtype=np.int8).reshape(1, 1, 2, 3)
    blosc2.asarray(labels, urlpath=str(label_file(tmp_path, "case")))
    assert read_structures(tmp_path, "case", [1, 2]).dtype == np.int8
    assert read_structures(tmp_path, "case", [1, 200]).dtype == np.int16
    assert read_structures(tmp_path, "case", [1, 2]).ravel().tolist() == [0, 0, 1, 2, 0, 0]
    assert read_structures(tmp_path, "case", [1, 2], ignored=4).ravel().tolist() == [0, 0, 1, 2, 0, -1]

"""Label maps beside preprocessed images."""

from __future__ import annotations

import blosc2
import numpy as np

from nnssl_stc3d.data.voxel_labels import anatomical_labels, label_file, read_labels


def test_labels_of_regions_ignored_voxels_and_body_masks():
    assert anatomical_labels({"labels": {"background": 0, "body": 1}}) == {}
    assert anatomical_labels({"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}}) == {
        1: "whole",
        2: "core",
    }


def test_a_label_map_is_read_as_nnunet_wrote_it(tmp_path):
    labels = np.random.default_rng(0).integers(-1, 3, size=(1, 4, 5, 6)).astype(np.int8)
    blosc2.asarray(labels, urlpath=str(label_file(tmp_path, "case")))
    np.testing.assert_array_equal(read_labels(tmp_path, "case"), labels[0])

"""nnU-Net's folders, empty."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """The folder of raw data; the variables name all three."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("NNSSL_STC3D_DEBUG", raising=False)
    return tmp_path / "nnUNet_raw"

"""Images and label maps from files, read as nnU-Net reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from numpy.typing import NDArray


def read_volume(file: Path, is_label_map: bool = True) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    """Reads a file with the first of nnU-Net's readers that can: not every one has a format's spacing.

    Args:
        file: of any format of nnU-Net.
        is_label_map: or a channel of an image, whose name ends with its number.

    Returns:
        Voxels (Z, Y, X) and spacing (z, y, x) in mm.

    Raises:
        ValueError: no reader can, with what the last one said.
    """
    problem: Exception | None = None
    for reader in LIST_OF_IO_CLASSES:
        if not file.name.lower().endswith(tuple(reader.supported_file_endings)):
            continue
        try:
            voxels, properties = reader().read_seg(str(file)) if is_label_map else reader().read_images([str(file)])
        except Exception as error:  # Readers raise what their libraries raise.
            problem = error
        else:
            return voxels[0], tuple(float(s) for s in properties["spacing"])
    raise ValueError(f"expected an image that nnU-Net can read, got {file}: {problem or 'no reader knows its ending'}")

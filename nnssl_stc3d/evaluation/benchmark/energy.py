"""What a GPU has used, where its driver counts that."""

from __future__ import annotations

import importlib
import os


def gpu_joules(gpu: str) -> float | None:
    """Energy that a GPU has used since its driver was loaded; differences of it are what a run used.

    Args:
        gpu: index or UUID; "" is the first one that this process may use.

    Returns:
        Joules, or None where no driver counts them (before Volta, or without an NVIDIA GPU).
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    name = gpu or os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        nvml.nvmlInit()
        find = nvml.nvmlDeviceGetHandleByIndex if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID
        millijoules: int = nvml.nvmlDeviceGetTotalEnergyConsumption(find(int(name) if name.isdigit() else name))
    except nvml.NVMLError:
        return None
    return millijoules / 1000

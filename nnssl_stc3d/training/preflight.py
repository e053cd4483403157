"""What can be refused before anything is built or written."""

from __future__ import annotations

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def check_environment() -> None:
    """Name a variable that is not set; nnU-Net's constructor fails on it with a TypeError about paths."""
    for name, path in (("nnUNet_preprocessed", nnUNet_preprocessed), ("nnUNet_results", nnUNet_results)):
        if not path.is_set():
            raise RuntimeError(
                f"{name} is not set. Set it to a folder, such as: export {name}=/data/{name} "
                "(`nnssl_stc3d doctor` checks all of them)."
            )


def check_configuration(plans: dict, configuration: str, what: str = "pretraining") -> None:
    """Refuse what is not a plain 3D configuration, before nnU-Net makes any folder."""
    manager = PlansManager(plans).get_configuration(configuration)
    if len(manager.patch_size) != 3:
        raise NotImplementedError(
            f"{what} supports 3D configurations, {configuration} has patches of {len(manager.patch_size)} "
            "dimensions. Use 3d_fullres or 3d_lowres."
        )
    if manager.previous_stage_name is not None:
        raise NotImplementedError(
            f"{what} does not support cascades: {configuration} needs the predictions of "
            f"{manager.previous_stage_name}. Use 3d_fullres or 3d_lowres."
        )

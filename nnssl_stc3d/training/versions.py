"""Which versions wrote a checkpoint."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("nnssl_stc3d", "nnunetv2", "torch", "batchgeneratorsv2", "dynamic_network_architectures", "numpy")


def installed_versions() -> dict[str, str]:
    """Version of each package that results depend on; "unknown" for one that runs without being installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions

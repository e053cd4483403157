"""Package metadata. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Returns the version written in the package, without importing it."""
    text = (ROOT / "nnssl_stc3d" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("nnssl_stc3d/__init__.py has no line __version__ = ...")
    return match.group(1)


def read_long_description() -> str:
    """Returns the README, or nothing where it is not part of the tree."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


MONAI = ["monai>=1.5", "einops"]

setup(
    name="nnssl_stc3d",
    version=read_version(),
    description="Self-supervised pretraining for nnU-Net v2 with STC3D, through nnU-Net's own commands",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    # trainers/ lies beside the package in the repository, where people look for it, and inside it once installed.
    packages=[*find_packages(include=["nnssl_stc3d", "nnssl_stc3d.*"]), "nnssl_stc3d.trainers"],
    package_dir={"nnssl_stc3d.trainers": "trainers"},
    package_data={"nnssl_stc3d": ["py.typed"]},
    install_requires=[
        "nnunetv2>=2.8.1",
        "torch>=2.6",
        "batchgenerators",
        "batchgeneratorsv2",
        "dynamic-network-architectures",
        "SimpleITK",
        "acvl-utils",
        "numpy",
        "scipy",
        "matplotlib",
        "tqdm",
        "blosc2",
        "safetensors",
        "scikit-learn",
        # Reads what a GPU has used; does nothing without an NVIDIA driver.
        "nvidia-ml-py",
    ],
    # Swin-UNETR and surface Dice; nothing else needs it.
    extras_require={
        "monai": MONAI,
        "test": ["pytest", "pytest-xdist", "ruff", "mypy", "build", "setuptools>=70.1", *MONAI],
    },
    entry_points={"console_scripts": ["nnssl_stc3d=nnssl_stc3d.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)

"""Makes ``nnssl_stc3d`` importable for the modules here when the repository was cloned but not installed.

nnU-Net imports the modules of this folder in alphabetical order, so this one comes first. It does nothing once the
package is installed.
"""

import importlib
import sys
from pathlib import Path

try:
    importlib.import_module("nnssl_stc3d")
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

"""Runs the command line as ``python -m nnssl_stc3d``, which also works in a clone that is not installed."""

import sys

from nnssl_stc3d.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""The command line. Nothing else in the package imports from here.

A command is a module of this package, listed in ``main.COMMANDS``, with two functions:

* ``add_parser(subparsers) -> argparse.ArgumentParser`` adds the command's parser under its name;
* ``run(args) -> int`` does the work and returns the exit code.
"""

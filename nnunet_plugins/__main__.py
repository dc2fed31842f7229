"""`python -m nnunet_plugins env | doctor [NAME] | predict ...`: the export line, what is found, lean prediction."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from typing import NoReturn

from nnunet_plugins.doctor import diagnose
from nnunet_plugins.environment import export_line


class _Parser(argparse.ArgumentParser):
    """Bad words end in one line and status 2, as everywhere in the package."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}: see python -m nnunet_plugins --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 when the doctor finds something wrong."""
    parser = _Parser(prog="python -m nnunet_plugins", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print the line that tells nnU-Net where the trainers are, for a shell to eval")
    doctor = commands.add_parser("doctor", help="say what nnU-Net finds, from which file, and what is missing")
    doctor.add_argument("name", nargs="?", help="a trainer name to explain, as given to -tr; or: lean")
    commands.add_parser("predict", help="nnUNetv2_predict with its arguments, in less memory", add_help=False)
    choice, rest = parser.parse_known_args(arguments)
    if choice.command == "predict":
        return predict(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if choice.command == "env":
        print(export_line())
        return 0
    return diagnose(choice.name)


def predict(arguments: list[str]) -> int:
    """Run ``nnUNetv2_predict`` leanly, or ``nnUNetv2_predict_from_modelfolder`` when ``-m`` names a model folder.

    Returns:
        0; 1 when some cases failed; 2 when it could not start.
    """
    if find_spec("nnunetv2") is None:
        print("nnunetv2 is not installed: pip install 'monai-memeff[nnunet]'", file=sys.stderr)
        return 2
    from nnunet_plugins.lean.command import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

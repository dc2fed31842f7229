"""`python -m nnunet_plugins env | doctor [NAME]`: the export line, and what nnU-Net will find."""

from __future__ import annotations

import argparse
import sys

from nnunet_plugins.doctor import diagnose
from nnunet_plugins.environment import export_line


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 when the doctor finds something wrong."""
    parser = argparse.ArgumentParser(prog="python -m nnunet_plugins", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print the line that tells nnU-Net where the trainers are, for a shell to eval")
    doctor = commands.add_parser("doctor", help="say what nnU-Net finds, from which file, and what is missing")
    doctor.add_argument("name", nargs="?", help="a trainer name to explain, as given to -tr")
    choice = parser.parse_args(arguments)
    if choice.command == "env":
        print(export_line())
        return 0
    return diagnose(choice.name)


if __name__ == "__main__":
    sys.exit(main())

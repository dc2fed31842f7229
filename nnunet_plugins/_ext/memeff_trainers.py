"""The one file nnU-Net looks into: hands out the trainers of nnunet_plugins by name, each loaded when it is used.

nnU-Net imports this file as a top-level module and forgets it again; the trainers live in `nnunet_plugins`, outside
this folder, so they stay imported and can be pickled. A name that is not ours costs nothing and never raises, so
other people's trainers are found whatever state this package is in.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Return the trainer of that name; AttributeError (which nnU-Net takes as "not here") for any other name."""
    try:
        import nnunet_plugins
    except ImportError:  # the variable came from another environment: this one does not have the package
        raise AttributeError(name) from None
    trainer = name.partition(" (of monai-memeff")[0]  # checkpoints say where a trainer comes from, for who has it not
    if trainer not in nnunet_plugins.TRAINERS:
        raise AttributeError(name)
    return getattr(nnunet_plugins, trainer)

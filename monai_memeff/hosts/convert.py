"""`memeff convert`: a file of MinkowskiEngine's weights in, one for the completion network out."""

from __future__ import annotations

from pathlib import Path

import torch

from monai_memeff.data import atomic_write
from monai_memeff.errors import InputError
from monai_memeff.sparse.networks.minkowski_weights import convert_file


def write_converted(checkpoint: Path, output: Path, channels: str | None) -> str:
    """Convert a checkpoint and write it, whole or not at all.

    Args:
        checkpoint: file that ``torch.save`` wrote.
        output: file to write, another one.
        channels: seven numbers with commas in between; None: those of the checkpoint.

    Returns:
        What was written, in one line.

    Raises:
        InputError: the numbers, the file or its tensors do not fit.
    """
    try:
        wanted = None if channels is None else tuple(int(number) for number in channels.split(","))
    except ValueError:
        raise InputError(f"--channels takes seven numbers with commas in between, got {channels!r}") from None
    try:
        state, found = convert_file(str(checkpoint), wanted)
    except InputError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError) as error:  # of tensors that no network of ours has
        raise InputError(f"cannot convert {checkpoint}: {error}") from None
    with atomic_write(output, checkpoint) as work:
        torch.save(state, work)
    return f"wrote {output}: {len(state)} tensors for SparseCompletionNet(channels={found})"

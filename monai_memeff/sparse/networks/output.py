"""What the networks give back for voxels that they did not compute, and the metadata of their outputs."""

from __future__ import annotations

from monai.data import MetaTensor
from torch import Tensor

ABSENT_LOGIT = 10.0
"""Size of the logit of voxels that were not computed: a probability below 5e-5."""


def like_input(output: Tensor, image: Tensor) -> Tensor:
    """Carry the metadata of a MetaTensor input over to an output of the same grid."""
    if not isinstance(image, MetaTensor):
        return output
    result = MetaTensor(output).copy_meta_from(image)
    result.is_batch = image.is_batch
    return result

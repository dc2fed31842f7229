"""A coarse mask brought onto a fine grid, for sparse super-resolution."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, ensure_tuple_rep
from torch import Tensor

from monai_memeff.checks import check_mask
from monai_memeff.sparse.transforms.placement import (
    fine_to_coarse,
    interpolate_cells,
    mark_cells,
    repeat_cells,
)
from monai_memeff.sparse.transforms.volumes import checked_volume, on_grid_of, one_of, plain

PLACE_MODES = ("repeat", "center", "corner", "trilinear")

ALIGNMENTS = ("auto", "affine", "extent")


class ResampleToGrid(Transform):
    """Bring a coarse mask onto a fine grid: the input of a sparse super-resolution network.

    Both grids are met at cell centers. By affine, they may differ in axes, extent and tilt; a fine voxel outside of the
    coarse volume gets 0. Extents need not be multiples of each other.

    Args:
        mode: "repeat": a fine voxel takes the cell that holds its center (nearest up-sampling); "center" and "corner":
            every occupied cell marks one fine voxel, that at its center or at its first corner; "trilinear": float32
            values between the centers of cells, to compare with.
        align: "affine": by the affines of both MetaTensors; "extent": the grids cover the same space, face to face;
            "auto": by affine if both are MetaTensors, else by extent.

    Raises:
        ValueError: ``mode`` or ``align`` is unknown.

    Examples:
        >>> ResampleToGrid(align="extent")(torch.ones(1, 4, 4, 4), torch.zeros(1, 8, 8, 9)).shape
        torch.Size([1, 8, 8, 9])
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, mode: str = "repeat", align: str = "auto") -> None:
        self.mode = one_of("mode", mode, PLACE_MODES)
        self.align = one_of("align", align, ALIGNMENTS)

    def __call__(self, img: NdarrayOrTensor, reference: NdarrayOrTensor) -> Tensor:
        """Place.

        Args:
            img: (C, h, w, d), the coarse mask, non-zero where there is something ("trilinear": values).
            reference: (C', H, W, D), any volume on the fine grid; its values are not used.

        Returns:
            (C, H, W, D), uint8 of 0 and 1 (float32 with "trilinear"), with the metadata of ``reference``.

        Raises:
            ValueError: a volume is not (C, H, W, D) or not finite, the mask has negative numbers, an affine is missing,
                or what is occupied lies outside of the fine grid as a whole.
            TypeError: a volume is not a tensor or an array.
        """
        coarse, fine = checked_volume(img, "ResampleToGrid"), checked_volume(reference, "ResampleToGrid")
        to_coarse, shape = fine_to_coarse(coarse, fine, self.align), fine.shape[1:]
        if self.mode == "trilinear":
            return on_grid_of(interpolate_cells(plain(coarse).float(), to_coarse, shape), fine)
        check_mask(coarse, "ResampleToGrid")
        cells = (plain(coarse) != 0).to(torch.uint8)
        if self.mode == "repeat":
            placed = repeat_cells(cells, to_coarse, shape)
        else:
            placed = mark_cells(cells, to_coarse, shape, corner=self.mode == "corner")
        if bool(cells.any()) and not bool(placed.any()):
            raise ValueError(
                f"no occupied cell of the coarse mask lies in the fine grid of {tuple(shape)} voxels; check that both "
                "files have their affines and show one patient."
            )
        return on_grid_of(placed, fine)


class ResampleToGridd(MapTransform):
    """Dictionary version of :class:`ResampleToGrid`.

    Args:
        keys: coarse masks.
        reference_key: a volume on the fine grid.
        placed_key: where the placed masks go, one name per key; None: in place of the coarse ones.
        mode: see :class:`ResampleToGrid`.
        align: see :class:`ResampleToGrid`.
        allow_missing_keys: pass over masks that are not there.

    Examples:
        >>> data = {"coarse": torch.ones(1, 4, 4, 4), "image": torch.zeros(1, 8, 8, 9)}
        >>> ResampleToGridd("coarse", reference_key="image", placed_key="fine")(data)["fine"].shape
        torch.Size([1, 8, 8, 9])
    """

    backend = ResampleToGrid.backend

    def __init__(
        self,
        keys: KeysCollection,
        reference_key: str,
        placed_key: str | Sequence[str] | None = None,
        mode: str = "repeat",
        align: str = "auto",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_key = reference_key
        self.placed_keys = ensure_tuple_rep(placed_key, len(self.keys)) if placed_key is not None else self.keys
        self.place = ResampleToGrid(mode, align)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the placed masks to a copy of ``data``."""
        result = dict(data)
        for key, placed_key in self.key_iterator(result, self.placed_keys):
            result[placed_key] = self.place(result[key], result[self.reference_key])
        return result


ResampleToGridD = ResampleToGridDict = ResampleToGridd

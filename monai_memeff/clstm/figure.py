"""A picture of a segmentation beside its reference: agreement green, false negatives red, false positives purple."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, optional_import

from monai_memeff.arguments import numbers_checked
from monai_memeff.data.atomic import atomic_write

GREEN, RED, PURPLE = (0.1, 0.8, 0.2), (0.9, 0.1, 0.1), (0.6, 0.1, 0.9)


def agreement_colors(image: np.ndarray, prediction: np.ndarray, reference: np.ndarray, opacity: float) -> np.ndarray:
    """Gray image (H, W) in 0 ... 1 with the colors laid over it: (H, W, 3)."""
    blend_images, _ = optional_import("monai.visualize", name="blend_images")
    color_map, _ = optional_import("matplotlib.colors", name="ListedColormap")
    kind = np.where(reference, np.where(prediction, 1, 2), np.where(prediction, 3, 0))[None] / 3
    palette = color_map([(0.0, 0.0, 0.0), GREEN, RED, PURPLE])
    return np.moveaxis(blend_images(image[None], kind, opacity, palette, rescale_arrays=False), 0, -1)


@numbers_checked
def save_agreement(
    path: str | os.PathLike[str],
    image: NdarrayOrTensor,
    prediction: NdarrayOrTensor,
    reference: NdarrayOrTensor,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    window: tuple[float, float] | None = None,
    opacity: float = 0.45,
) -> None:
    """Write sagittal, coronal and axial sections through the middle of the reference, as in the paper's figure 2.

    Args:
        path: File of the picture, for example a .png.
        image: (H, W, D), in the orientation RAS.
        prediction: (H, W, D); above 0 is inside.
        reference: (H, W, D), above 0 is inside; where it is empty, the sections go through the middle of the volume.
        spacing: Voxel size in millimeters, for the proportions.
        window: intensities that are black and white; None: the 1st and 99th percentile.
        opacity: Opacity of the colors, in [0, 1].

    Raises:
        ValueError: the three have different shapes, or are not 3D.

    Examples:
        >>> import os, tempfile
        >>> volume = torch.rand(8, 8, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_agreement(f"{folder}/case.png", volume, volume > 0.5, volume > 0.6)
        ...     os.listdir(folder)
        ['case.png']
    """
    volume, inside, truth = (np.asarray(convert_to_numpy(v), dtype=float) for v in (image, prediction, reference))
    if not volume.shape == inside.shape == truth.shape or volume.ndim != 3:
        raise ValueError(
            "image, prediction and reference must be volumes (H, W, D) of one shape, got "
            f"{volume.shape}, {inside.shape} and {truth.shape}."
        )
    low, high = np.percentile(volume, [1, 99]) if window is None else window
    gray = np.clip((volume - low) / max(high - low, 1e-6), 0, 1)
    found = np.argwhere(truth > 0)
    middle = found.mean(0).round().astype(int) if len(found) else np.array(volume.shape) // 2
    agg, _ = optional_import("matplotlib.backends.backend_agg")
    figure_module, _ = optional_import("matplotlib.figure")
    figure = figure_module.Figure(figsize=(12, 4.4), facecolor="black")
    agg.FigureCanvasAgg(figure)
    for axis, name in enumerate(("sagittal", "coronal", "axial")):
        section = [slice(None)] * 3
        section[axis] = middle[axis]
        place: Any = tuple(section)
        colors = agreement_colors(gray[place], inside[place] > 0, truth[place] > 0, opacity)
        across, up = (s for number, s in enumerate(spacing) if number != axis)
        axes = figure.add_subplot(1, 3, axis + 1)
        axes.imshow(colors.transpose(1, 0, 2), origin="lower", aspect=up / across)
        axes.set_title(name, color="white")
        axes.axis("off")
    figure.text(
        0.5, 0.02, "green: agreement   red: false negatives   purple: false positives", color="white", ha="center"
    )
    with atomic_write(path) as work:
        figure.savefig(work, format=Path(path).suffix[1:] or "png", dpi=100, facecolor="black")


class SaveAgreementd(MapTransform):
    """Write the picture of :func:`save_agreement` for every case that passes; the data goes through unchanged.

    Args:
        keys: predictions (1, H, W, D), above 0 is inside.
        image_key: Key of the image.
        label_key: Key of the reference.
        output_dir: folder; the picture is named after the image's file.
        window: see :func:`save_agreement`.
        allow_missing_keys: pass over predictions that are not there.

    Examples:
        >>> import os, tempfile
        >>> case = dict.fromkeys(("image", "label", "pred"), torch.ones(1, 8, 8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = SaveAgreementd("pred", output_dir=folder)(case)
        ...     os.listdir(folder)
        ['case_pred.png']
    """

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        image_key: str = "image",
        label_key: str = "label",
        output_dir: str | os.PathLike[str] = ".",
        window: tuple[float, float] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key, self.label_key, self.output_dir, self.window = image_key, label_key, Path(output_dir), window

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one picture per key."""
        result = dict(data)
        image = result[self.image_key]
        for key in self.key_iterator(result):
            spacing, name = (1.0, 1.0, 1.0), "case"
            if isinstance(image, MetaTensor):
                spacing = tuple(float(s) for s in image.pixdim)  # type: ignore[assignment]
                name = Path(str(image.meta.get("filename_or_obj", name))).name.split(".")[0]
            path = self.output_dir / f"{name}_{key}.png"
            save_agreement(path, image[0], result[key][0], result[self.label_key][0], spacing, self.window)
        return result


SaveAgreementD = SaveAgreementDict = SaveAgreementd

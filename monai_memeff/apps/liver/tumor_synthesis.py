"""Synthetic liver tumors in the place of real ones."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor

from monai_memeff.arguments import check_positive, numbers_checked
from monai_memeff.checks import check_finite, check_labels


def _box_mean(x: Tensor, size: int) -> Tensor:
    """Mean over cubes of `size` voxels, SAME padding with zeros, of (spatial...)."""
    low = (size - 1) // 2
    for axis in range(x.dim()):
        pads = [0, 0] * (x.dim() - 1 - axis) + [low, size - 1 - low]
        x = F.pad(x, pads).unfold(axis, size, 1).mean(-1)
    return x


def smooth_noise(shape: tuple[int, ...], coarse: int, noise: Tensor) -> Tensor:
    """Noise on a coarse grid, linearly upsampled and box-smoothed with the odd kernel next to `coarse`.

    Args:
        shape: spatial shape of the result.
        coarse: voxels per coarse cell.
        noise: coarse noise, one value per cell.
    """
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    large = F.interpolate(noise[None, None], size=shape, mode=mode, align_corners=False)[0, 0]
    return _box_mean(large, coarse + 1 - coarse % 2)


class RandTumorSynthesis(RandomizableTransform):
    """Remove the tumors of a liver and paint others of the same contrast.

    As the code of Hou et al. 2019 (https://arxiv.org/abs/1909.03108) does it offline. The contrast is 1.15 times the
    difference of mean intensity of liver and lesion. Real lesions are filled up by it, blurred with a box of side
    `resolution // 32`; new ones are where smoothed noise falls below a percentile of the volume, inside liver or
    lesion. Labels: 0 background, 1 liver, 2 lesion. The image is returned unchanged if it has no lesion, or none that
    is darker than the liver. The fraction of the liver that becomes lesion is approximate, because the percentile is
    taken over the whole volume, as published.

    Args:
        prob: Probability of a synthesis.
        contrast: Factor on the difference of means.
        min_ratio: Smallest fraction of lesion; the largest is 0.20 more.
        resolution: Side of the volume that sets the grain; by default the first axis of the image.

    Raises:
        ValueError: `prob` or `min_ratio` is outside [0, 1], or `contrast` is not above 0.

    Examples:
        >>> label = torch.ones(1, 16, 16, 16).index_fill(1, torch.arange(4), 2)  # liver with a lesion
        >>> image = 100.0 - 20 * (label == 2)
        >>> image, label = RandTumorSynthesis(prob=1.0, min_ratio=0.1).set_random_state(0)(image, label)
        >>> round(float((label == 2).float().mean()), 2)
        0.1
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self, prob: float = 0.5, contrast: float = 1.15, min_ratio: float = 0.05, resolution: int | None = None
    ) -> None:
        RandomizableTransform.__init__(self, prob)
        check_positive("contrast", contrast)
        self.contrast, self.min_ratio, self.resolution = contrast, min_ratio, resolution
        self._ratio = 0.0
        self._noise = torch.empty(0)

    def randomize(self, data: Any = None) -> None:
        """Draw the decision, the fraction of lesion and the coarse noise; `data` is (spatial shape, coarse cell)."""
        super().randomize(None)
        shape, coarse = data
        drawn = self.R.normal(0.01, 0.01) + self.R.normal(0.0, 0.05)
        self._ratio = float(np.clip(drawn, self.min_ratio, self.min_ratio + 0.20))
        noise = self.R.normal(size=[math.ceil(n / coarse) for n in shape])
        while (wild := np.abs(noise) > 2).any():
            noise[wild] = self.R.normal(size=int(wild.sum()))
        self._noise = torch.as_tensor(noise, dtype=torch.float32)

    def __call__(self, img: Tensor, label: Tensor, randomize: bool = True) -> tuple[Tensor, Tensor]:
        """Synthesize tumors.

        Args:
            img: image (1, spatial...).
            label: labels (1, spatial...): 0 background, 1 liver, 2 lesion.
            randomize: draw new random numbers.

        Returns:
            image and label of the same shapes and types.

        Raises:
            ValueError: other shapes, NaN or infinity, or other labels.
        """
        img, label = (convert_to_tensor(x, track_meta=isinstance(x, MetaTensor)) for x in (img, label))
        if img.ndim < 2 or img.shape != label.shape or len(img) != 1:
            raise ValueError(f"image and label must be (1, ...), got {tuple(img.shape)} and {tuple(label.shape)}.")
        check_finite(img, "RandTumorSynthesis")
        check_labels(label, "RandTumorSynthesis", 3)
        coarse = max((self.resolution or img.shape[1]) // 32, 1)
        if randomize:
            self.randomize((tuple(img.shape[1:]), coarse))
        if not self._do_transform:
            return img, label
        return self._paint(img, label, coarse)

    def _paint(self, img: Tensor, label: Tensor, coarse: int) -> tuple[Tensor, Tensor]:
        plain, kinds = img.as_subclass(Tensor)[0], label.as_subclass(Tensor)[0]
        liver, lesion = kinds == 1, kinds == 2
        difference = self.contrast * float(plain[liver].float().mean() - plain[lesion].float().mean())
        if not difference > 1e-4:  # also when there is no lesion (NaN)
            return img, label
        noise = smooth_noise(tuple(plain.shape), coarse, self._noise.to(plain.device))
        rank = max(int(noise.numel() * int(100 * self._ratio) / 100), 1)
        threshold = noise.flatten().kthvalue(rank).values
        fake = (noise < threshold) & (liver | lesion)
        change = _box_mean(lesion.float(), coarse) - _box_mean(fake.float(), coarse)
        new_img, new_label = img.clone(), label.clone()
        new_img[0] = (plain + difference * change).to(plain.dtype)
        new_label[0] = torch.where(fake, 2, torch.where(lesion, 1, kinds)).to(kinds.dtype)
        return new_img, new_label


class RandTumorSynthesisd(MapTransform, Randomizable):
    """Dictionary version of `RandTumorSynthesis`.

    Args:
        image_key: key of the image (1, spatial...).
        label_key: key of the labels (0 background, 1 liver, 2 lesion).
        prob: Probability of a synthesis.
        contrast: Factor on the difference of means.
        min_ratio: Smallest fraction of lesion.
        resolution: Side of the volume that sets the grain.
        allow_missing_keys: return the data as they are if a key is missing.

    Examples:
        >>> label = torch.ones(1, 16, 16, 16).index_fill(1, torch.arange(4), 2)
        >>> synthesize = RandTumorSynthesisd("image", "label", prob=1.0).set_random_state(0)
        >>> synthesize({"image": 100.0 - 20 * (label == 2), "label": label})["label"].unique()
        tensor([1., 2.])
    """

    backend = RandTumorSynthesis.backend

    @numbers_checked
    def __init__(
        self,
        image_key: str,
        label_key: str,
        prob: float = 0.5,
        contrast: float = 1.15,
        min_ratio: float = 0.05,
        resolution: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, (image_key, label_key), allow_missing_keys)
        self.synthesis = RandTumorSynthesis(prob, contrast, min_ratio, resolution)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandTumorSynthesisd:
        """Seed the transform."""
        self.synthesis.set_random_state(seed, state)
        super().set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Synthesize tumors in one case."""
        d = dict(data)
        image_key, label_key = self.keys
        if not self.allow_missing_keys or (image_key in d and label_key in d):
            d[image_key], d[label_key] = self.synthesis(d[image_key], d[label_key])
        return d


RandTumorSynthesisD = RandTumorSynthesisDict = RandTumorSynthesisd

"""Crops and samples of points: balls, cubes, a fixed number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.sparse.points.data import Data, PointTransform, select_points, with_attributes
from monai_memeff.sparse.points.grid_sampling import GridSampling3D

STRATEGIES = ("random", "freq_class_based")
CLASS_WEIGHTS = ("sqrt",)


class SphereSampling(PointTransform):
    """Keep the points of one ball.

    Args:
        radius: Radius in the unit of ``pos`` (millimeters); points at exactly this distance are kept.
        sphere_center: (3,) the center.
        align_origin: move the center to the origin.

    Raises:
        ValueError: the radius is not positive, or the center not three numbers.

    Examples:
        >>> cloud = Data(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [9.0, 9.0, 9.0]]))
        >>> SphereSampling(radius=3.0, sphere_center=(0, 0, 0))(cloud)
        Data(pos=[2, 3])
    """

    @numbers_checked
    def __init__(self, radius: float, sphere_center: Sequence[float] | Tensor, align_origin: bool = True) -> None:
        self.radius, self.align_origin = _positive("radius", radius), align_origin
        self.center = torch.as_tensor(sphere_center, dtype=torch.float64)
        if self.center.shape != (3,):
            raise ValueError(f"sphere_center must be three numbers, got the shape {tuple(self.center.shape)}.")

    def _process(self, data: Any) -> Any:
        center = self.center.to(data.pos)
        kept = select_points(data, _in_ball(data.pos, center, self.radius))
        return with_attributes(kept, {"pos": kept.pos - center}) if self.align_origin else kept


class RandomSphere(Randomizable, PointTransform):
    """Keep the points of a ball around a random point.

    Args:
        radius: Radius in the unit of ``pos``.
        strategy: ``"random"``: every point is as likely; ``"freq_class_based"``: a class of the labels ``y`` is drawn,
            a rare one with higher probability, and then a point of it.
        class_weight_method: ``"sqrt"``: a class with n points has the weight 1 / sqrt(n); there is no other.
        center: move the center to the origin.

    Raises:
        ValueError: an unknown strategy or weight, a radius that is not positive, no point, or labels ``y`` are wanted
            and missing.

    Examples:
        >>> cloud = Data(torch.rand(100, 3))
        >>> RandomSphere(radius=2.0).set_random_state(seed=0)(cloud)  # the whole unit cube is nearer than 2
        Data(pos=[100, 3])
    """

    @numbers_checked
    def __init__(
        self, radius: float, strategy: str = "random", class_weight_method: str = "sqrt", center: bool = True
    ) -> None:
        if strategy not in STRATEGIES or class_weight_method not in CLASS_WEIGHTS:
            raise ValueError(
                f"strategy must be one of {', '.join(STRATEGIES)} and class_weight_method one of "
                f"{', '.join(CLASS_WEIGHTS)}, got {strategy!r} and {class_weight_method!r}."
            )
        self.radius, self.center = _positive("radius", radius), center
        self.strategy, self.class_weight_method = strategy, class_weight_method
        self._row = 0

    def randomize(self, data: Any) -> None:
        """Draw the point at the center."""
        if self.strategy == "random":
            self._row = int(self.R.randint(len(data.pos)))
            return
        labels = getattr(data, "y", None)
        if not isinstance(labels, Tensor) or len(labels.reshape(-1)) != len(data.pos):
            raise ValueError("strategy='freq_class_based' needs one label y per point; set it or use 'random'.")
        _, kind, counts = torch.unique(labels.reshape(-1), return_inverse=True, return_counts=True)
        weights = counts.double().pow(-1.5)[kind].cpu().numpy()  # 1 / sqrt(n) for the class, spread over n points
        self._row = int(self.R.choice(len(weights), p=weights / weights.sum()))

    def _process(self, data: Any) -> Any:
        _check_not_empty(self, data)
        self.randomize(data)
        return SphereSampling(self.radius, data.pos[self._row], align_origin=self.center)(data)


class CubeCrop(Randomizable, PointTransform):
    """Keep the points of a randomly turned cube around a random point; positions stay as they are.

    The turns about the three axes follow each other in random order.

    The center is drawn evenly over space: among one point per cell of ``grid_size_center``.

    Args:
        c: half the edge of the cube, in the unit of ``pos``.
        rot_x: the cube is turned about x by an angle in [-rot_x, rot_x] degrees; 0 for a cube along the axes.
        rot_y: Largest angle about y.
        rot_z: Largest angle about z.
        grid_size_center: edge of the cells that make centers even, in the unit of ``pos``; the default of
            torch-points3d is in meters: give some millimeters.

    Raises:
        ValueError: ``c`` or ``grid_size_center`` is not positive, or there is no point.

    Examples:
        >>> cloud = Data(torch.rand(100, 3))
        >>> CubeCrop(c=2.0, grid_size_center=0.1).set_random_state(seed=0)(cloud)  # every point is nearer than 2
        Data(pos=[100, 3])
    """

    @numbers_checked
    def __init__(
        self,
        c: float = 1,
        rot_x: float = 180,
        rot_y: float = 180,
        rot_z: float = 180,
        grid_size_center: float = 0.01,
    ) -> None:
        self.c, self.angles = _positive("c", c), (rot_x, rot_y, rot_z)
        self.even = GridSampling3D(_positive("grid_size_center", grid_size_center), mode="last")
        self._center, self._turn = torch.zeros(3), torch.eye(3)

    def randomize(self, data: Any) -> None:
        """Draw the center and the turn."""
        self._center = _even_centers(self, self.even, data.pos, 1)[0]
        angles = [np.radians(self.R.uniform(-a, a)) for a in self.angles]
        self._turn = torch.from_numpy(_rotation(angles, self.R.permutation(3)))

    def _process(self, data: Any) -> Any:
        _check_not_empty(self, data)
        self.randomize(data)
        turned = (data.pos - self._center) @ self._turn.to(data.pos).T
        return select_points(data, (turned.abs() <= self.c).all(dim=1))


class RandomSphereDropout(Randomizable, PointTransform):
    """Remove the points of random balls.

    The centers are drawn evenly over space, as in :class:`CubeCrop`.

    Args:
        num_sphere: number of balls.
        radius: Radius of every ball, in the unit of ``pos``.
        grid_size_center: edge of the cells that make centers even, in the unit of ``pos``; the default of
            torch-points3d is in meters: give some millimeters.

    Raises:
        ValueError: ``num_sphere`` is negative, or ``radius`` or ``grid_size_center`` not positive.

    Examples:
        >>> cloud = Data(torch.rand(100, 3))
        >>> RandomSphereDropout(num_sphere=1, radius=2.0, grid_size_center=0.1)(cloud)  # one ball holds all points
        Data(pos=[0, 3])
    """

    @numbers_checked
    def __init__(self, num_sphere: int = 10, radius: float = 5, grid_size_center: float = 0.01) -> None:
        if num_sphere < 0:
            raise ValueError(f"num_sphere must not be negative, got {num_sphere}.")
        self.num_sphere, self.radius = num_sphere, _positive("radius", radius)
        self.even = GridSampling3D(_positive("grid_size_center", grid_size_center), mode="last")
        self._centers = torch.zeros(0, 3)

    def randomize(self, data: Any) -> None:
        """Draw the centers."""
        self._centers = _even_centers(self, self.even, data.pos, self.num_sphere)

    def _process(self, data: Any) -> Any:
        if len(data.pos) == 0:
            return select_points(data, torch.zeros(0, dtype=torch.int64, device=data.pos.device))
        self.randomize(data)
        keep = torch.ones(len(data.pos), dtype=torch.bool, device=data.pos.device)
        for center in self._centers:
            keep &= ~_in_ball(data.pos, center, self.radius)
        return select_points(data, keep)


class FixedPoints(Randomizable, PointTransform):
    """Keep a fixed number of random points, as torch_geometric's transform of this name.

    Args:
        num: number of points.
        replace: draw with replacement.
        allow_duplicates: without replacement, take points again once all are taken, so that there are always ``num``;
            else a smaller cloud keeps all its points.

    Raises:
        ValueError: ``num`` is less than 1, or there is no point.

    Examples:
        >>> FixedPoints(10, replace=False).set_random_state(seed=0)(Data(torch.rand(100, 3)))
        Data(pos=[10, 3])
    """

    @numbers_checked
    def __init__(self, num: int, replace: bool = True, allow_duplicates: bool = False) -> None:
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}.")
        self.num, self.replace, self.allow_duplicates = num, replace, allow_duplicates
        self._rows = np.zeros(0, dtype=np.int64)

    def randomize(self, data: Any) -> None:
        """Draw the rows."""
        count = len(data.pos)
        if self.replace:
            self._rows = self.R.randint(count, size=self.num)
            return
        rounds = math.ceil(self.num / count) if self.allow_duplicates else 1
        self._rows = np.concatenate([self.R.permutation(count) for _ in range(rounds)])[: self.num]

    def _process(self, data: Any) -> Any:
        _check_not_empty(self, data)
        self.randomize(data)
        return select_points(data, torch.from_numpy(self._rows.astype(np.int64)).to(data.pos.device))


def _in_ball(pos: Tensor, center: Tensor, radius: float) -> Tensor:
    return (pos - center).square().sum(dim=1) <= radius**2


def _even_centers(owner: Randomizable, even: GridSampling3D, pos: Tensor, count: int) -> Tensor:
    """(count, 3) positions, drawn by the owner's random state among one point per cell."""
    even.R = owner.R
    candidates = even(Data(pos)).pos
    return candidates[torch.from_numpy(owner.R.randint(len(candidates), size=count)).to(pos.device)]


def _rotation(angles: Sequence[float], order: Sequence[int] | np.ndarray = (0, 1, 2)) -> np.ndarray:
    """(3, 3) turns about the axes in radians, one after the other in the given order of axes."""
    from scipy.spatial.transform import Rotation

    signs = (1, -1, 1)  # torch-points3d turns about the second axis the other way
    return Rotation.from_euler("".join("xyz"[a] for a in order), [signs[a] * angles[a] for a in order]).as_matrix()


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number in the unit of pos, got {value}.")
    return float(value)


def _check_not_empty(owner: PointTransform, data: Any) -> None:
    if len(data.pos) == 0:
        raise ValueError(f"{type(owner).__name__} needs at least one point, got none; check the mask they came from.")

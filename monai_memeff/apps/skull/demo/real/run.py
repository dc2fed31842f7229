"""A head that really has a hole: find it, train on the healthy bone, fill it, and show the mirror's answer beside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.utils import get_largest_connected_component_mask
from nibabel.affines import apply_affine
from rich.console import Console
from torch import Tensor

from monai_memeff.apps.skull import RandSkullDefect
from monai_memeff.apps.skull.demo import methods
from monai_memeff.apps.skull.demo.io import check_size
from monai_memeff.apps.skull.demo.mirror import MirrorResult, mirror_implant, transform_mask
from monai_memeff.apps.skull.demo.options import SkullOptions
from monai_memeff.apps.skull.demo.pretrained import ShippedModel, shipped_model
from monai_memeff.apps.skull.demo.real import report
from monai_memeff.apps.skull.demo.real.healthy import UNKNOWN, HealthyBoneSampler, training_heads
from monai_memeff.apps.skull.demo.real.holes import LEAST_CM2, SkullHole, find_hole, in_cm2
from monai_memeff.apps.skull.demo.report import WRITTEN
from monai_memeff.apps.skull.demo.run import (
    TEST_SEED,
    check_defects,
    head_of,
    show_progress,
    threads_restored,
    training_seconds,
)
from monai_memeff.apps.skull.demo.volume import HeadVolume, prepare_head
from monai_memeff.apps.skull.metrics import implant_scores
from monai_memeff.apps.skull.phantom import head_phantom
from monai_memeff.data.folder import atomic_folder, check_output_folder
from monai_memeff.errors import InputError

GENERATED = 4  # heads
LEARNING_RATE, FINE_TUNING_RATE = 4e-3, 1e-3
OUTSIDE_MOST, OUTSIDE_WARNED, MIDLINE_WARNED = 0.5, 0.02, 0.02
NEAR_MM = 6.0
CAP_MM, CAP_WARNED = 6.0, 0.5
RIM = 2  # cells beyond the zone that an implant may take


def run_defective(options: SkullOptions, smallest_cm2: float | None = None, iterations: int | None = None) -> None:
    """Fill the real hole of a head, and print and write what came out.

    Args:
        options: ``image`` is needed, a head with a hole in its vault; ``seconds=None`` are 240 at size 64.
        smallest_cm2: the smallest area of a hole; None: 4. Below that slits and burr holes are found, with thin bone.
        iterations: training steps, instead of a time.

    Raises:
        InputError: on every bad input, in one line, before training starts; also when there is no hole.
    """
    if options.image is None:
        raise InputError("--defective fills the hole of a real head: give its CT with --image")
    target = check_output_folder(options.output, WRITTEN, options.image)
    size, seed = check_size(64 if options.size is None else options.size), options.seed
    least = check_smallest(smallest_cm2)
    seconds, defects = training_seconds(options.seconds, size, networks=2.5), check_defects(options.defects, size)
    console, shipped = Console(), shipped_model()
    with console.status("reading the head"):
        head = head_of(options, size, shipped)
        hole = hole_of(head, least)
        tests = _test_defects(head, hole, defects)
    console.print(f"{head.name}: {head.size}^3 cells of {head.cell_mm:.2f} mm; hole of {in_cm2(hole.area_cm2)}")
    with console.status("mirroring the healthy side"):
        mirror = _mirror(head)
        piece = in_the_hole(mirror.mirrored & ~head.skull, hole)
    warnings = find_warnings(head, hole, mirror)
    for warning in warnings:
        console.print(f"Warning: {warning}.", highlight=False)
    fills = [report.Fill("registered mirror", piece)]
    torch.manual_seed(seed)
    method = methods.SparseMethod(_weights(shipped, head), ignore_index=UNKNOWN)
    if _weights(shipped, head) is not None:
        fills.append(_fill("shipped model, before any training", method, head, hole, tests))
    with console.status("generating heads"):
        sampler = make_sampler(head, hole, mirror, seed)
    rate = LEARNING_RATE if _weights(shipped, head) is None else FINE_TUNING_RATE
    with show_progress(console, "sparse network") as progress, threads_restored():
        training = methods.train(method, sampler, seconds, rate, progress, iterations)
    fills.append(_fill("sparse network", method, head, hole, tests, training))
    result = report.RealReport(head, hole, fills, side_of(hole, mirror), warnings, seed)
    with console.status("writing"), atomic_folder(target, WRITTEN, ("report.txt", "report.json")) as folder:
        report.write(folder, result)
    console.print(report.text(result), highlight=False)
    console.print(f"written to {target}", highlight=False)


def check_smallest(smallest_cm2: float | None) -> float:
    """The smallest area of a hole in square centimeters, 4 unless given."""
    least = LEAST_CM2 if smallest_cm2 is None else smallest_cm2
    if not 0 < least < float("inf"):
        raise InputError(f"--smallest-cm2 must be positive and finite, got {least:g}; leave it out for {LEAST_CM2:g}")
    return least


def hole_of(head: HeadVolume, least_cm2: float = LEAST_CM2) -> SkullHole:
    """The hole, when there is one inside the image.

    Raises:
        InputError: no hole of so many square centimeters, or most of it lies outside the image.
    """
    hole = find_hole(head.skull, head.affine, least_cm2)
    if hole is None:
        smaller = (
            "slits and burr holes are smaller: --smallest-cm2 0.2 --size 128 looks for them; "
            if least_cm2 >= LEAST_CM2
            else ""
        )
        raise InputError(
            f"{head.name} has no hole of {least_cm2:g} cm2 or more in its vault, seen at cells of {head.cell_mm:.1f} mm"
            f" ({smaller}a larger --size shows finer gaps): leave out --defective, or raise --threshold"
        )
    outside = outside_share(head, hole)
    if outside > OUTSIDE_MOST:
        raise InputError(
            f"{outside:.0%} of what is missing in {head.name} lies outside the image, and at most {OUTSIDE_MOST:.0%}"
            " may: the vault is cut off, give an image of the whole head"
        )
    return hole


def outside_share(head: HeadVolume, hole: SkullHole) -> float:
    """Which part of the hole's surface lies outside the field of view."""
    index = apply_affine(np.linalg.inv(head.ct_affine), hole.surface)
    return float(((index < -0.5) | (index > np.array(head.bone.shape) - 0.5)).any(axis=1).mean())


def midline_share(hole: SkullHole, mirror: MirrorResult) -> float:
    """Which part of the hole's surface has hole on its other side too, where a mirror finds nothing."""
    from scipy.spatial import cKDTree

    away, _ = cKDTree(hole.surface).query(apply_affine(mirror.transform, hole.surface))
    return float((away < NEAR_MM).mean())


def find_warnings(head: HeadVolume, hole: SkullHole, mirror: MirrorResult) -> tuple[str, ...]:
    """What makes the answer doubtful, one sentence each."""
    warnings = []
    middle, outside = midline_share(hole, mirror), outside_share(head, hole)
    if middle > MIDLINE_WARNED:
        warnings.append(f"the hole crosses the midline: for {middle:.0%} of it the other side is missing too")
    if outside > OUTSIDE_WARNED:
        warnings.append(f"the vault is cut off by the field of view: {outside:.0%} of the hole lies outside the image")
    if cap_share(head) > CAP_WARNED:
        warnings.append(
            f"the highest bone is {cap_share(head):.0%} as wide as the head: the vault is cut off, and what looks like"
            " a hole may be a part that no image shows"
        )
    if hole.area_cm2 < LEAST_CM2:
        warnings.append(
            f"a gap of {in_cm2(hole.area_cm2)} may be a slit, a burr hole, or bone too thin for the threshold: look at"
            " the figure"
        )
    if hole.others_cm2:
        areas = " and ".join(map(in_cm2, hole.others_cm2))
        warnings.append(f"there are further holes, of {areas}, which are not filled: the largest one is")
    return tuple(warnings)


def cap_share(head: HeadVolume) -> float:
    """How wide and long the highest 6 mm of bone are, of the whole head; the smaller of the two fractions.

    The cap of a round vault is narrow, a third or less; a plane that cuts it leaves a wide ring.
    """
    depth = max(1, round(CAP_MM / head.cell_mm))
    top = int(head.skull.any(axis=(0, 1)).nonzero()[0].max()) + 1
    wide = [
        [np.ptp(np.flatnonzero(part.any(axis=(1 - axis, 2)))) + 1 for axis in (0, 1)]
        for part in (head.skull[:, :, top - depth : top], head.skull)
    ]
    return float((np.array(wide[0]) / np.array(wide[1])).min())


def side_of(hole: SkullHole, mirror: MirrorResult) -> str:
    """On which side the hole lies: "right", "left" or "both sides"."""
    right = float((hole.surface[:, 0] > apply_affine(mirror.transform, hole.surface)[:, 0]).mean())
    return "right" if right > 0.95 else "left" if right < 0.05 else "both sides"


def make_sampler(head: HeadVolume, hole: SkullHole, mirror: MirrorResult, seed: int) -> HealthyBoneSampler:
    """Batches of the patient's healthy bone, its mirror image and generated heads, on the head's grid."""
    zone = transform_mask(hole.zone, head.affine, mirror.transform)
    made = [_generated(head, 1000 + seed + k) for k in range(GENERATED)]
    return HealthyBoneSampler(training_heads(head, hole, mirror.mirrored, zone, made), hole, seed)


def _generated(head: HeadVolume, seed: int) -> np.ndarray:
    made = head_phantom((74, 90, 96), 2.5, seed)
    image = MetaTensor(made.image[None], affine=made.affine)
    return prepare_head(image, head.size, name="generated head", model=head.model).skull


def in_the_hole(added: np.ndarray, hole: SkullHole) -> np.ndarray:
    """The largest connected piece of what was added at the hole."""
    from scipy import ndimage

    return get_largest_connected_component_mask(added & ndimage.binary_dilation(hole.zone, iterations=RIM))


def _mirror(head: HeadVolume) -> MirrorResult:
    try:
        return mirror_implant(head.skull, head.affine)
    except ValueError as error:
        raise InputError(str(error)) from error


def _weights(shipped: ShippedModel | None, head: HeadVolume) -> dict[str, Tensor] | None:
    return dict(shipped.weights) if shipped is not None and head.model is not None else None


@torch.no_grad()
def added_bone(method: methods.CompletionMethod, skull: np.ndarray) -> np.ndarray:
    """Cells that the network adds to a skull, bool (S, S, S)."""
    completed = method.complete(torch.from_numpy(skull[None, None].astype(np.float32)))[0, 0]
    return completed.numpy().astype(bool) & ~skull


def _test_defects(head: HeadVolume, hole: SkullHole, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Skulls with one more defect, in healthy bone, and the bone that was taken: bool (S, S, S) each."""
    cut = RandSkullDefect()
    cut.set_random_state(TEST_SEED)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    try:
        for _ in range(20 * count):
            defective, implant = (v[0].as_subclass(Tensor).numpy() > 0 for v in cut(head.tensor()))
            if (implant & hole.zone).sum() < 0.05 * implant.sum():
                found.append((defective, implant))
            if len(found) == count:
                break
    except ValueError as error:
        raise InputError(str(error)) from error
    return found


def _fill(
    name: str,
    method: methods.CompletionMethod,
    head: HeadVolume,
    hole: SkullHole,
    tests: Sequence[tuple[np.ndarray, np.ndarray]],
    training: methods.Training | None = None,
) -> report.Fill:
    """What a network puts into the hole, and how well it fills unseen defects of healthy bone."""
    scores = [
        implant_scores(
            torch.from_numpy(get_largest_connected_component_mask(added_bone(method, defective) & ~hole.zone)),
            torch.from_numpy(truth), torch.from_numpy(defective), head.cell_mm,
        )
        for defective, truth in tests
    ]  # fmt: skip
    return report.Fill(name, in_the_hole(added_bone(method, head.skull), hole), tuple(scores), training)

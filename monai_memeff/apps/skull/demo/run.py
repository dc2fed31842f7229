"""The main job: train on random defects of one head, complete defects that were not seen, and write what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from monai_memeff.apps.skull import RandSkullDefect
from monai_memeff.apps.skull.demo import methods, report
from monai_memeff.apps.skull.demo.io import check_size
from monai_memeff.apps.skull.demo.mirror import mirror_implant
from monai_memeff.apps.skull.demo.options import SkullOptions
from monai_memeff.apps.skull.demo.pretrained import ModelGrid, ShippedModel, shipped_model
from monai_memeff.apps.skull.demo.volume import HeadVolume, load_head
from monai_memeff.apps.skull.metrics import implant_scores
from monai_memeff.data.folder import atomic_folder, check_output_folder
from monai_memeff.errors import InputError

SECONDS_AT_64 = 95.0
LEARNING_RATE = {"sparse": 4e-3, "dense": 2e-3}
SHIPPED = "shipped model"
TEST_SEED = 12345
DEFECT_BYTES = 2**32  # all unseen defects; each is two masks of the grid


@dataclass(frozen=True)
class HeldOutDefect:
    """A defect that no method has seen: defective skull and implant, bool (S, S, S)."""

    __test__ = False  # not a test, for pytest

    defective: np.ndarray
    implant: np.ndarray


def run_demo(options: SkullOptions) -> None:
    """Run the main job and print its report.

    Args:
        options: ``image=None`` generates a head; ``seconds=None`` are 95 for each network at size 64, growing with the
            volume.

    Raises:
        InputError: on every bad input, in one line, before training starts.
    """
    target = check_output_folder(options.output, report.WRITTEN, options.image)
    size, seed = check_size(64 if options.size is None else options.size), options.seed
    seconds, defects = training_seconds(options.seconds, size), check_defects(options.defects, size)
    console, shipped = Console(), shipped_model()
    with console.status("reading the head"):
        head = head_of(options, size, shipped)
        tests = _test_defects(head, defects)
    console.print(f"{head.name}: {head.size}^3 cells of {head.cell_mm:.2f} mm, occupancy {head.occupancy:.1%}")
    results, implants = _compare(head, tests, seconds, seed, console, shipped)
    result = report.make_report(head, results, seed=seed, shown=0)
    with console.status("writing"), atomic_folder(target, report.WRITTEN, report.REPORTS) as folder:
        numbers = report.write_case(folder, head, tests[0].defective, tests[0].implant, implants[0], _caption(results))
        result.extra.update(numbers)  # type: ignore[attr-defined]
        report.write_report(folder, result)
    console.print(report.report_table(result))
    console.print("\n".join(report.report_lines(result)), highlight=False)
    console.print(f"written to {target}", highlight=False)


def head_of(options: SkullOptions, size: int, shipped: ShippedModel | None) -> HeadVolume:
    """The head that the options name, on the shipped model's grid where there is one of this size."""
    return load_head(
        options.image,
        size,
        options.threshold,
        options.seed,
        options.series,
        options.resample,
        model_grid(shipped, size),
    )


def training_seconds(seconds: float | None, size: int, networks: float = 1) -> float:
    """Seconds of training, the given ones or 95 for each network at size 64 and as the volume grows."""
    if seconds is None:
        seconds = networks * SECONDS_AT_64 * (size / 64) ** 3
    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds must be positive and finite, got {seconds:g}; leave it out for the default")
    return seconds


def check_defects(defects: int | None, size: int) -> int:
    """The number of unseen defects, 6 unless given; refused where they do not fit into memory."""
    defects, most = 6 if defects is None else defects, DEFECT_BYTES // (2 * size**3)
    if not 1 <= defects <= most:
        raise InputError(
            f"--defects must be 1 to {most} at size {size} (they are kept in memory), got {defects}; leave it out for 6"
        )
    return defects


def model_grid(shipped: ShippedModel | None, size: int) -> ModelGrid | None:
    """The shipped model's grid, when it is of this size."""
    return shipped.grid if shipped is not None and shipped.grid.grid == size else None


def _compare(
    head: HeadVolume,
    tests: list[HeldOutDefect],
    seconds: float,
    seed: int,
    console: Console,
    shipped: ShippedModel | None,
) -> tuple[list[report.MethodResult], list[np.ndarray]]:
    """Scores of all methods, and the implants of the sparse network."""
    with console.status("mirroring the healthy side"):
        results = [_score("registered mirror", head, tests, _mirror(head))[0]]
    implants: list[np.ndarray] = []
    rates = LEARNING_RATE if shipped is None or head.model is None else {**LEARNING_RATE, "sparse": 1e-3}
    weights = shipped.weights if shipped is not None and head.model is not None else None
    if weights is not None:
        results.append(_score(SHIPPED, head, tests, _learned(methods.SparseMethod(weights)))[0])
    for name, label, build in (
        ("sparse", "sparse network", lambda: methods.SparseMethod(weights)),
        ("dense", "dense MONAI UNet", methods.DenseMethod),
    ):
        torch.manual_seed(seed)
        method = build()
        with show_progress(console, label) as progress, threads_restored():
            training = methods.train(method, _sampler(head, seed), seconds, rates[name], progress)
        result, found = _score(label, head, tests, _learned(method), method, training, _sampler(head, seed))
        results.append(result)
        implants = implants or found
    return results, implants


def _sampler(head: HeadVolume, seed: int) -> methods.DefectSampler:
    return methods.DefectSampler(head.tensor(), seed)


def _test_defects(head: HeadVolume, count: int) -> list[HeldOutDefect]:
    cut = RandSkullDefect()
    cut.set_random_state(TEST_SEED)
    try:
        pairs = [cut(head.tensor()) for _ in range(count)]
    except ValueError as error:
        raise InputError(str(error)) from error
    return [HeldOutDefect(d[0].as_subclass(Tensor).numpy() > 0, i[0].as_subclass(Tensor).numpy() > 0) for d, i in pairs]


def _mirror(head: HeadVolume) -> Callable[[np.ndarray], np.ndarray]:
    return lambda defective: mirror_implant(defective, head.affine).implant


def _learned(method: methods.CompletionMethod) -> Callable[[np.ndarray], np.ndarray]:
    return lambda defective: methods.implant(method, torch.from_numpy(defective[None].astype(np.float32)))


def _score(
    label: str,
    head: HeadVolume,
    tests: list[HeldOutDefect],
    complete: Callable[[np.ndarray], np.ndarray],
    method: methods.CompletionMethod | None = None,
    training: methods.Training | None = None,
    sampler: methods.DefectSampler | None = None,
) -> tuple[report.MethodResult, list[np.ndarray]]:
    start = time.perf_counter()
    implants = [complete(test.defective) for test in tests]
    test_seconds = (time.perf_counter() - start) / len(tests)
    scores = [
        implant_scores(
            torch.from_numpy(found), torch.from_numpy(t.implant), torch.from_numpy(t.defective), head.cell_mm
        )
        for found, t in zip(implants, tests, strict=True)
    ]
    if method is None or training is None or sampler is None:
        return report.MethodResult(label, scores, test_seconds=test_seconds), implants
    train_peak, test_peak = methods.peak_bytes(method, sampler)
    learned = report.MethodResult(
        label,
        scores,
        train_seconds=training.seconds,
        iterations=training.iterations,
        parameters=sum(p.numel() for p in method.network.parameters()),
        train_peak_bytes=train_peak,
        test_peak_bytes=test_peak,
        test_seconds=test_seconds,
    )
    return learned, implants


@contextmanager
def show_progress(console: Console, label: str) -> Iterator[methods.Progress]:
    """A bar of a training, and what to call after every iteration."""
    line = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc=f"training {label}", bar_format=line, file=console.file) as bar:

        def show(fraction: float, step: int, loss: float) -> None:
            bar.set_postfix_str(f"step {step}, loss {loss:.3f}", refresh=False)
            bar.update(fraction - bar.n)

        yield show


@contextmanager
def threads_restored() -> Iterator[None]:
    """Give torch its number of threads back afterwards."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _caption(results: list[report.MethodResult]) -> str:
    shown = [(r.name, r.scores[0]) for r in results]
    return "; ".join(f"{name}: implant DSC {score['implant_dice']:.2f}" for name, score in shown)

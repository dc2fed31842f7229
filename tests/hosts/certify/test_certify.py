"""`memeff certify`: what differs is counted right, what cannot be proven is said, and a page is whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer

from monai_memeff.data import read_volume
from monai_memeff.errors import InputError
from monai_memeff.halo import plan
from monai_memeff.hosts.certify import certify, command
from monai_memeff.hosts.certify.runs import run_window
from monai_memeff.hosts.certify.sources.subject import Options, Subject, window_of
from tests.hosts.certify import networks

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = "tests.hosts.certify.networks"
SHAPE = (18, 12, 15)
AFFINE = np.diag([-1.0, 1.5, 3.0, 1.0])
WINDOW = Options(window=(8, 8, 8))


def save(file: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write NIfTI."""
    nibabel.save(nibabel.Nifti1Image(values, affine), file)
    return file


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Noise whose mean drifts along every axis."""
    drift = np.add.outer(np.add.outer(np.arange(18), np.arange(12)), np.arange(15)) / 20
    return (np.random.default_rng(0).normal(size=SHAPE) + drift - drift.mean()).astype(np.float32)


@pytest.fixture(scope="module")
def image(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("image") / "image.nii.gz", values)


def certified(output: Path) -> dict[str, Any]:
    return json.loads((output / "certificate.json").read_text())


def logits(network: torch.nn.Module, values: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(values)[None, None])[0].numpy()


@pytest.mark.slow
def test_a_streamed_network_is_exact_and_the_window_is_counted(image: Path, values: np.ndarray, tmp_path: Path) -> None:
    label = save(tmp_path / "label.nii.gz", (values > 0.7).astype(np.uint8))
    status = certify(f"{HERE}:above_mean", [image], tmp_path / "out", [label], repeats=3, partitions=4, options=WINDOW)
    found = certified(tmp_path / "out")
    assert status == 0
    assert found["verdict"]["exact"] is True
    whole = logits(networks.above_mean(), values).argmax(0)
    inferer = SlidingWindowInferer((8, 8, 8))
    windows = inferer(torch.from_numpy(values)[None, None], networks.above_mean())[0].argmax(0).numpy()
    differing = int((whole != windows).sum())
    assert 0 < differing < whole.size
    assert found["differences"]["window"]["voxels"] == differing
    assert found["differences"]["streamed"]["voxels"] == 0
    truth = values > 0.7
    for way, labels in (("whole", whole), ("window", windows)):
        dice = 2 * int(((labels == 1) & truth).sum()) / int((labels == 1).sum() + truth.sum())
        assert found["dice"]["runs"][way]["label 1"] == pytest.approx(dice, abs=1e-12)
    assert found["repeats"]["identical"]
    assert len(found["repeats"]["sha256"]) == 3
    assert found["runs"]["streamed"]["details"]["partitions"] == 4
    streamed = found["runs"]["streamed"]["details"]
    assert streamed["measured_device_bytes"] <= streamed["planned_device_bytes"]
    assert found["plan"]["sha256"] == hashlib.sha256(found["plan"]["text"].encode()).hexdigest()
    assert found["image"]["files"][0]["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert {"monai-memeff", "torch", "monai", "numpy", "python"} <= set(found["versions"])
    page = (tmp_path / "out" / "certificate.html").read_text()
    assert "Exact in labels" in page
    assert page.count("<img ") == 6  # the labels, and where the window differs
    assert hashlib.sha256((tmp_path / "out" / "certificate.json").read_bytes()).hexdigest() in page


@pytest.mark.slow
def test_extents_that_the_network_does_not_take_are_padded_and_said(
    image: Path, values: np.ndarray, tmp_path: Path
) -> None:
    assert certify(f"{HERE}:unet", [image], tmp_path / "out", repeats=1, partitions=2, options=WINDOW) == 0
    found = certified(tmp_path / "out")
    assert found["input"]["padded_to"] == [1, 1, 20, 12, 16]
    assert "with zeros around it" in found["notes"][0]
    network = networks.unet().eval()
    padded = np.pad(values, [(1, 1), (0, 0), (0, 1)])
    whole = logits(network, padded)[:, 1:-1, :12, :15]
    streamed = found["differences"]["streamed"]
    assert streamed["largest_logit"] == pytest.approx(float(np.abs(whole).max()), rel=1e-5)
    assert streamed["largest_logit_difference"] < 1e-5 * streamed["largest_logit"]
    assert found["differences"]["window"]["voxels"] > 0
    assert found["runs"]["whole"]["predicted_bytes"] == pytest.approx(found["runs"]["whole"]["peak_bytes"], rel=0.1)


@pytest.mark.slow
def test_odd_extents_that_a_network_rounds_up_are_padded(tmp_path: Path) -> None:
    """MONAI's UNet takes 15 voxels and returns 16: compared is what belongs to the 15."""
    values = np.random.default_rng(1).normal(size=(15, 12, 11)).astype(np.float32)
    image = save(tmp_path / "image.nii.gz", values)
    assert certify(f"{HERE}:rounding", [image], tmp_path / "out", repeats=1, partitions=2, options=WINDOW) == 0
    found = certified(tmp_path / "out")
    assert found["input"]["padded_to"] == [1, 1, 16, 12, 12]
    whole = logits(networks.rounding().eval(), np.pad(values, [(0, 1), (0, 0), (0, 1)]))[:, :15, :12, :11]
    assert found["differences"]["streamed"]["largest_logit"] == pytest.approx(float(np.abs(whole).max()), rel=1e-5)


@pytest.mark.slow
def test_a_network_that_cannot_be_partitioned_is_refused_on_the_page(image: Path, tmp_path: Path) -> None:
    assert certify(f"{HERE}:branching", [image], tmp_path / "out", repeats=2, options=WINDOW) == command.NOT_EXACT
    found = certified(tmp_path / "out")
    assert found["verdict"]["exact"] is False
    assert "Branching" in found["runs"]["streamed"]["refused"]
    page = (tmp_path / "out" / "certificate.html").read_text()
    assert "Refused" in page
    assert "networks.py" in page  # the line of the user's own file


@pytest.mark.slow
def test_without_the_whole_network_nothing_is_proven(image: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert certify(f"{HERE}:sign", [image], output, repeats=2, whole=False, options=WINDOW) == command.NOT_EXACT
    found = certified(output)
    assert found["verdict"]["exact"] is None
    assert "Not proven" in found["verdict"]["sentence"]
    assert found["differences"]["window"]["voxels"] == 0
    assert "streamed" not in found["differences"]


@pytest.mark.slow
def test_a_budget_makes_the_parts(image: Path, tmp_path: Path) -> None:
    output, one = tmp_path / "out", plan(networks.unet(), (1, 1, 20, 12, 16), partitions=1).peak_bytes
    assert certify(f"{HERE}:unet", [image], output, repeats=1, budget=f"{one // 2} B", options=WINDOW) == 0
    details = certified(output)["runs"]["streamed"]["details"]
    assert details["partitions"] > 1
    assert details["measured_device_bytes"] <= details["planned_device_bytes"] <= one // 2


@pytest.mark.slow
def test_a_budget_that_nothing_fits_is_refused_on_the_page(image: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert certify(f"{HERE}:unet", [image], output, repeats=1, budget="1kB", options=WINDOW) == command.NOT_EXACT
    assert "Refused" in certified(output)["verdict"]["sentence"]


@pytest.mark.slow
def test_one_channel_needs_a_threshold(image: Path, values: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--threshold 0"):
        certify(f"{HERE}:convolution", [image], tmp_path / "out", options=WINDOW)
    options = Options(threshold=0.0, window=(8, 8, 8))
    label = save(tmp_path / "label.nii.gz", (logits(networks.convolution(), values)[0] > 0).astype(np.int16))
    assert certify(f"{HERE}:convolution", [image], tmp_path / "out", [label], repeats=1, options=options) == 0
    assert certified(tmp_path / "out")["dice"]["runs"]["whole"] == {"label 1": 1.0}


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("broken", "NaN or infinite"),
        ("counting", "changes its own weights|cannot be streamed"),
        ("failing", "failing failed: KeyError: 'no such weights'|failing failed: KeyError"),
        ("text", "returned str"),
        ("shapes", "without weights"),
        ("halving", "returns 9 x 6 x 8 voxels of 18 x 12 x 15"),
        ("leaving", "SystemExit: 3"),
        ("absent", "no function 'absent'"),
    ],
)
@pytest.mark.slow
def test_what_is_no_network_ends_in_one_line(network: str, said: str, image: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as refused:
        certify(f"{HERE}:{network}", [image], tmp_path / "out", repeats=2, options=Options(threshold=0.0))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def damaged(image: Path, folder: Path) -> dict[str, Any]:
    """Name -> arguments of `certify` that are refused, and what is said."""
    values = np.asarray(nibabel.load(image).dataobj).copy()
    values[3, 3, 3] = np.nan
    nan = save(folder / "nan.nii.gz", values)
    other = save(folder / "other.nii.gz", np.zeros(SHAPE, np.uint8), np.diag([-1.0, 1.5, 3.1, 1.0]))
    small = save(folder / "small.nii.gz", np.zeros((4, 5, 6), np.uint8))
    below = save(folder / "below.nii.gz", np.full(SHAPE, -1, np.int16))
    soft = save(folder / "soft.nii.gz", np.full(SHAPE, 0.5, np.float32))
    return {
        "image with NaN": ({"images": [nan]}, "NaN or infinite"),
        "label on another grid": ({"labels": [other]}, "off the image's grid"),
        "label of another size": ({"labels": [small]}, "4 x 5 x 6 voxels and the image 18 x 12 x 15"),
        "label of no whole numbers": ({"labels": [soft]}, "not whole numbers"),
        "label below 0": ({"labels": [below]}, "not whole numbers from 0 on"),
        "two labels": ({"labels": [save(folder / "l.nii.gz", np.zeros(SHAPE, np.uint8))] * 2}, "--label was given 2"),
        "no image": ({"images": []}, "--image is needed"),
        "absent image": ({"images": [folder / "absent.nii.gz"]}, "does not exist"),
        "no run": ({"repeats": 0}, "--repeats"),
        "no part": ({"partitions": 0}, "--partitions"),
        "parts and budget": ({"partitions": 2, "budget": "1GiB"}, "without --budget"),
        "no size": ({"budget": "much"}, "a size is a number"),
        "no module": ({"model": "not_there:network"}, "there is no module not_there"),
        "no threshold": ({"options": Options(threshold=float("nan"))}, "--threshold must be a number"),
        "no model": ({"model": str(folder / "absent")}, "neither a folder of a MONAI bundle"),
        "some folder": ({"model": str(folder)}, "neither configs/inference.json"),
        "output is a file": ({"output": nan}, "is a file"),
    }


@pytest.mark.slow
def test_what_cannot_be_compared_ends_in_one_line(image: Path, tmp_path: Path) -> None:
    for name, (changed, said) in damaged(image, tmp_path).items():
        arguments: dict[str, Any] = {"model": f"{HERE}:sign", "images": [image], "output": tmp_path / "out"}
        with pytest.raises(InputError, match=said) as refused:
            certify(**{**arguments, "options": WINDOW, **changed})
        assert "\n" not in str(refused.value), name
        assert not (tmp_path / "out").exists(), name


@pytest.mark.parametrize("text", ["8,8", "0", "a", "8,8,8,8", "-1,2,3", ""])
def test_a_window_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="--window"):
        window_of(text)


@pytest.mark.slow
def test_a_certificate_is_not_overwritten_and_other_files_stay(image: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert certify(f"{HERE}:sign", [image], tmp_path, repeats=1, options=WINDOW) == 0
    before = (tmp_path / "certificate.json").read_text()
    with pytest.raises(InputError, match="holds a certificate already"):
        certify(f"{HERE}:sign", [image], tmp_path, repeats=1, options=WINDOW)
    assert (tmp_path / "certificate.json").read_text() == before
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["monai_memeff.hosts.certify.work.Work._repeat", "pathlib.Path.write_text"])
@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(
    place: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        certify(f"{HERE}:sign", [image], tmp_path / "out", repeats=1, options=WINDOW)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_that_differ_are_not_exact(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_memeff.hosts.certify import streamer

    right: Callable[..., Any] = streamer.Streamer._answer
    calls: list[int] = []

    def unlike(self: Any) -> Any:
        calls.append(1)
        return right(self) + (1e-3 if len(calls) == 3 else 0.0)

    monkeypatch.setattr(streamer.Streamer, "_answer", unlike)
    assert certify(f"{HERE}:sign", [image], tmp_path / "out", repeats=4, options=WINDOW) == command.NOT_EXACT
    assert "4 streamed runs gave 2 different results" in certified(tmp_path / "out")["verdict"]["sentence"]


@pytest.mark.parametrize(("change", "said"), [(-5.0, "Not exact in labels: "), (0.2, "more than rounding explains")])
@pytest.mark.slow
def test_a_wrong_stream_is_told(
    change: float, said: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai_memeff.hosts.certify import streamer

    right: Callable[..., Any] = streamer.Streamer._answer

    def wrong(self: Any) -> Any:
        answer = right(self).clone()
        if change > 0:
            return answer * (1 + change)
        answer[0, 1, 2, 3, 4] = answer[0, 0, 2, 3, 4] - 2 * answer[0, 1, 2, 3, 4]
        return answer

    monkeypatch.setattr(streamer.Streamer, "_answer", wrong)
    output = tmp_path / "out"
    status = certify(f"{HERE}:sign", [image], output, repeats=2, options=WINDOW)
    found = certified(output)
    assert status == command.NOT_EXACT
    assert said in found["verdict"]["sentence"]
    assert found["verdict"]["exact"] is False
    assert found["differences"]["streamed"]["voxels"] == (change < 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_window_of_integers_gives_what_the_network_gives(dtype: torch.dtype, image: Path) -> None:
    """MONAI's window itself adds up results in the input's type, and fails on integers."""
    network, inputs = networks.Table(), torch.randint(0, 256, (1, 1, *SHAPE)).to(dtype)
    subject = Subject(
        "name", "kind", network, inputs, lambda answer: answer, "rule", read_volume(image).image,
        SlidingWindowInferer((8, 8, 8)), {},
    )  # fmt: skip
    run = run_window(subject)
    assert run.refused == ""
    torch.testing.assert_close(run.answer, network(inputs).detach(), rtol=1e-5, atol=1e-5)
    subject.inputs = inputs.long() + 2**40
    with pytest.raises(InputError, match=r"holds integers up to 16777216 exactly, got 10995"):
        run_window(subject)

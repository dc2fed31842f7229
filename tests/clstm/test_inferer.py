"""Slabs with a state that stays give the whole volume's result, from memory and from disk, forth and back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_memeff.clstm import CLSTMUNet, NiftiSlabs, SlabInferer, SliceSequence
from monai_memeff.memory import measure_peak


def network(bidirectional: bool = False, **options: Any) -> CLSTMUNet:
    torch.manual_seed(0)
    settings = {"channels": (2, 3, 4), "hidden_channels": 2, "bidirectional": bidirectional, **options}
    net = CLSTMUNet(**settings).double().eval()
    for name, parameter in net.named_parameters():
        if name.startswith("cell"):
            nn.init.uniform_(parameter, -0.6, 0.7)
    return net


def whole(net: CLSTMUNet, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@pytest.fixture(params=[False, True], ids=["one way", "both ways"])
def net(request: pytest.FixtureRequest) -> CLSTMUNet:
    return network(request.param)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("slab", [1, 4, 7, 13, 100])
def test_any_slab_gives_the_whole(net: CLSTMUNet, slab: int, prefetch: int) -> None:
    x = torch.randn(2, 1, 9, 11, 13, dtype=torch.float64)
    result = SlabInferer(slab=slab, prefetch=prefetch)(x, net)
    torch.testing.assert_close(result, whole(net, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_in_float32(axis: int) -> None:
    net = network(True, axis=axis).float()
    x = torch.randn(1, 1, 9, 10, 11)
    torch.testing.assert_close(SlabInferer(slab=4)(x, net), whole(net, x), rtol=0, atol=1e-6)


def test_without_the_state_the_result_is_another() -> None:
    net, x = network(), torch.randn(1, 1, 9, 11, 8, dtype=torch.float64)
    parts = torch.cat([whole(net, part) for part in x.split(4, -1)], -1)
    assert (parts - whole(net, x)).abs().max() > 1e-3


def test_slabs_of_different_depths_from_a_generator() -> None:
    net, x = network(), torch.randn(1, 1, 9, 11, 10, dtype=torch.float64)
    asked: list[int] = []

    def slabs() -> Iterator[Tensor]:
        for number, part in enumerate(x.split([1, 5, 4], -1)):
            asked.append(number)
            yield part

    results = SlabInferer(prefetch=1)(slabs(), net)
    first = next(results)
    assert len(asked) <= 3
    torch.testing.assert_close(torch.cat([first, *results], -1), whole(net, x), rtol=0, atol=1e-6)


def test_both_ways_walk_a_sequence_twice_and_refuse_an_iterator() -> None:
    net, x = network(True), torch.randn(1, 1, 9, 11, 10, dtype=torch.float64)
    results = list(SlabInferer()(x.split([1, 5, 4], -1), net))
    torch.testing.assert_close(torch.cat(results, -1), whole(net, x), rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="walks over the slabs twice: give a sequence"):
        SlabInferer()(iter(x.split(5, -1)), net)


def test_reading_ahead_happens_in_another_thread_and_its_errors_arrive() -> None:
    threads: list[int] = []

    def slabs() -> Iterator[Tensor]:
        threads.append(threading.get_ident())
        yield torch.rand(1, 1, 8, 8, 2, dtype=torch.float64)
        raise OSError("the disk is gone")

    results = SlabInferer(prefetch=1)(slabs(), network())
    next(results)
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)
    assert threads[0] != threading.get_ident()


def test_metadata_and_labels() -> None:
    net = network(out_channels=3).float()
    x = MetaTensor(torch.randn(1, 1, 9, 11, 5), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])))
    result = SlabInferer(slab=2, labels=True)(x, net)
    assert torch.equal(result.affine, x.affine)
    assert result.dtype == torch.uint8
    assert torch.equal(result.as_tensor(), whole(net, x).as_tensor().argmax(1, keepdim=True).to(torch.uint8))
    single = network().float()
    assert torch.equal(SlabInferer(labels=True)(x, single).as_tensor(), (whole(single, x) > 0).as_tensor().byte())


def test_a_trainer_gets_gradients_through_it() -> None:
    net = network().train()
    SlabInferer(slab=2)(torch.randn(1, 1, 8, 8, 4, dtype=torch.float64), net).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_depth(net: CLSTMUNet) -> None:
    class Slabs(list):
        """Made when they are asked for."""

        def __init__(self, count: int) -> None:
            super().__init__(range(count))

        def __getitem__(self, number: Any) -> Tensor:
            return torch.zeros(1, 1, 32, 32, 4, dtype=torch.float64)

        def __iter__(self) -> Iterator[Tensor]:
            return (self[number] for number in range(len(self)))

    peaks = []
    for count in (4, 16):
        with measure_peak() as meter:
            for _ in SlabInferer(prefetch=0)(Slabs(count), net):
                pass
        peaks.append(meter.peak_bytes)
    states = 12 * 2 * 2 * 32 * 32 * 8 if net.bidirectional else 0  # one state per slab for the way back
    assert peaks[1] <= peaks[0] + states + 1024


# Files


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_is_read_and_written_slab_by_slab(net: CLSTMUNet, ending: str, tmp_path: Path) -> None:
    net = net.float()
    rng = np.random.default_rng(0)
    values = (rng.random((9, 11, 13)) * 1000).astype(np.int16)
    affine = np.array([[-1.0, 0, 0, 5], [0, 2, 0.1, 6], [0, -0.1, 3, 7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(values, affine), tmp_path / f"head{ending}")
    slabs = NiftiSlabs(tmp_path / f"head{ending}", slab=4, transform=lambda slab: slab / 500 - 1)
    assert len(slabs) == 4
    image = torch.from_numpy(values / 500 - 1).float()[None, None]
    net.head.bias.data -= whole(net, image).median()  # some voxels inside, some outside
    out = slabs.create_labels(tmp_path / "labels.nii")
    SlabInferer(labels=True).write(slabs, net, out)
    written = nib.load(tmp_path / "labels.nii")
    expected = SlabInferer(labels=True)(image, net)[0, 0]
    assert 0 < expected.float().mean() < 1
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected.numpy())
    np.testing.assert_allclose(written.affine, affine, atol=1e-6)
    assert written.get_data_dtype() == np.uint8


def test_labels_need_a_name_that_can_be_written_in_place(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"must end in \.nii"):
        NiftiSlabs(tmp_path / "a.nii").create_labels(tmp_path / "b.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), tmp_path / "4d.nii")
    with pytest.raises(ValueError, match=r"reads 3D volumes, .* has the shape \(4, 4, 4, 2\)"):
        NiftiSlabs(tmp_path / "4d.nii")


def test_slabs_that_monai_split_share_an_affine_and_are_taken() -> None:
    net, x = network(), MetaTensor(torch.randn(1, 1, 9, 11, 10, dtype=torch.float64))
    results = list(SlabInferer()(x.split(4, -1), net))
    torch.testing.assert_close(torch.cat([r.as_tensor() for r in results], -1), whole(net, x.as_tensor()))


def test_write_fills_an_array_from_a_volume() -> None:
    net, x = network(), MetaTensor(torch.randn(1, 1, 9, 11, 10, dtype=torch.float64))
    for out in (np.zeros((1, 1, 9, 11, 10)), torch.zeros(1, 1, 9, 11, 10, dtype=torch.float64)):
        SlabInferer(slab=3).write(x, net, out)
        torch.testing.assert_close(torch.as_tensor(out), whole(net, x.as_tensor()))


# Refusals


def meta(depth: int, begin: float, spacing: float = 2.0, plane: int = 8) -> MetaTensor:
    affine = torch.diag(torch.tensor([1.0, 1.0, spacing, 1.0], dtype=torch.float64))
    affine[2, 3] = begin
    return MetaTensor(torch.rand(1, 1, plane, 8, depth, dtype=torch.float64), affine=affine)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (meta(4, 8.0, 3.0), r"slab 1 does not continue .* its slice spacing is 3 mm after 2; resample"),
        (meta(4, 12.0), r"slab 1 does not continue .* first slice lies 4 mm off"),
        (meta(4, 8.0, plane=9), r"slab 1 has the in-plane shape \(1, 1, 9, 8\), the ones before \(1, 1, 8, 8\)"),
    ],
    ids=["spacing", "missing slices", "plane"],
)
def test_slabs_that_do_not_continue_are_refused(second: MetaTensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        list(SlabInferer()([meta(4, 0.0), second], network()))
    assert "\n" not in str(caught.value)
    assert len(list(SlabInferer()([meta(4, 0.0), meta(3, 8.0)], network()))) == 2


def test_what_it_cannot_run_is_refused() -> None:
    with pytest.raises(TypeError, match="runs CLSTMUNet on a volume and nothing else, got Conv3d with 0"):
        SlabInferer()(torch.rand(1, 1, 4, 4, 4), nn.Conv3d(1, 1, 1))
    with pytest.raises(TypeError, match="with 1 further arguments"):
        SlabInferer()(torch.rand(1, 1, 4, 4, 4), network(), 3)
    with pytest.raises(ValueError, match=r"takes a volume \(B, C, H, W, D\), got \(1, 4, 4, 4\)"):
        SlabInferer()(torch.rand(1, 4, 4, 4), network())
    with pytest.raises(ValueError, match="slab must be a whole number of at least 1"):
        SlabInferer(slab=0)
    with pytest.raises(ValueError, match="finite values"):
        SlabInferer()(torch.full((1, 1, 4, 4, 4), torch.nan, dtype=torch.float64), network())


def test_slabs_of_the_transform_go_straight_in(net: CLSTMUNet) -> None:
    x = MetaTensor(torch.randn(1, 9, 11, 13, dtype=torch.float64), affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    cut = SliceSequence(4)
    results = [y[0] for y in SlabInferer()([slab[None] for slab in cut(x)], net)]
    torch.testing.assert_close(cut.inverse(results).as_tensor(), whole(net, x.as_tensor()[None])[0])

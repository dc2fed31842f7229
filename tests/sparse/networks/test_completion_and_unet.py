"""SparseCompletionNet against sets in plain Python, SparseUNet against MONAI's UNet and a masked dense emulation."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from monai_memeff.memory import measure_peak
from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet, SparseTensor, SparseUNet
from monai_memeff.sparse.core.tensor import nonzero_voxels
from tests.oracles import assert_same_as_dense, asymmetric
from tests.sparse.networks.test_coarse_to_sparse import MaskedDense
from tests.sparse.reference import Voxel, floored, generated_by_sets, random_mask, set_of

ODD = (37, 70, 41)
SMALL = (2, 2, 3, 3, 4, 4, 5)
STRIDES = (32, 16, 8, 4, 2, 1)


def shell(shape: tuple[int, int, int], items: int = 1, bite: bool = False) -> Tensor:
    """(B, 1, H, W, D): ellipsoid shells that differ by item, with a bite taken out if wanted."""
    axes = [torch.linspace(-1, 1, extent, dtype=torch.float64) for extent in shape]
    i, j, k = torch.meshgrid(*axes, indexing="ij")
    volumes = []
    for item in range(items):
        radius = ((i / 0.9) ** 2 + (j / (0.8 - 0.1 * item)) ** 2 + ((k - 0.1) / 0.85) ** 2).sqrt()
        volume = (radius < 1) & (radius > 0.8)
        volumes.append(volume & ~((i > 0.3) & (j > 0)) if bite else volume)
    return torch.stack(volumes)[:, None].float()


# --- SparseCompletionNet


@pytest.mark.parametrize(
    ("channels", "count"),
    [
        ((8, 8, 16, 16, 32, 32, 64), 434_695),
        ((22, 32, 32, 128, 156, 256, 388), 18_137_201),
        ((2, 2, 4, 4, 4, 4, 16), 16_563),
    ],
)
def test_parameter_counts(channels: tuple[int, ...], count: int) -> None:
    assert sum(p.numel() for p in SparseCompletionNet(channels).parameters()) == count


def expected_candidates(present: set[Voxel], kept: list[set[Voxel]], shapes: list[tuple[int, ...]]) -> list[set[Voxel]]:
    """Candidates of every level, from what was kept one level above: generated, clipped, united with the encoder's."""
    above = [floored(present, 64), *kept]
    levels = zip(above, STRIDES, shapes, strict=True)
    kernels = iter((4, 2, 2, 2, 2, 2))
    return [generated_by_sets(a, next(kernels), shape) | floored(present, stride) for a, stride, shape in levels]


def shapes_of(shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """Extents at strides 32 ... 1, rounded up."""
    return [tuple(-(-extent // stride) for extent in shape) for stride in STRIDES]


def positive(level: SparseTensor) -> set[Voxel]:
    """Candidates with a logit above zero."""
    return set_of(level.prune(level.features[:, 0] > 0))


@pytest.mark.slow
def test_candidates_in_training() -> None:
    complete, defective = shell(ODD, 2), shell(ODD, 2, bite=True)
    defective[:, :, :5] = 0
    levels = SparseCompletionNet(SMALL).train()(defective, complete)
    present, wanted = set_of(nonzero_voxels(defective)), set_of(nonzero_voxels(complete))
    assert [level.stride for level in levels] == [(stride,) * 3 for stride in STRIDES]
    assert [level.spatial_shape for level in levels] == shapes_of(ODD)
    kept = [
        positive(level) | (floored(wanted, stride) & set_of(level))
        for level, stride in zip(levels[:-1], STRIDES, strict=False)
    ]
    assert [set_of(level) for level in levels] == expected_candidates(present, kept, shapes_of(ODD))
    assert all(level.features.shape[1] == 1 for level in levels)
    assert positive(levels[-1]) != set_of(levels[-1])


def test_candidates_in_evaluation_follow_the_logits_alone() -> None:
    defective = shell(ODD, 2, bite=True)
    net, found = SparseCompletionNet(SMALL).eval(), []
    for head in net.heads:
        head.register_forward_hook(lambda module, inputs, level: found.append(level))
    result = net(nonzero_voxels(defective))
    kept = [positive(level) for level in found[:-1]]
    present = set_of(nonzero_voxels(defective))
    assert [set_of(level) for level in found] == expected_candidates(present, kept, shapes_of(ODD))
    assert set_of(result) == set_of(found[-1])


def test_dense_input_gives_dense_logits() -> None:
    defective = shell(ODD, 2, bite=True)
    net = SparseCompletionNet(SMALL).eval()
    with torch.no_grad():
        sparse, dense = net(nonzero_voxels(defective)), net(defective)
    assert torch.equal(dense, sparse.dense(-10.0))
    assert dense.shape == (2, 1, *ODD)


def test_only_the_place_of_a_voxel_counts() -> None:
    defective = shell((33, 20, 40), bite=True)
    net = SparseCompletionNet(SMALL).eval()
    with torch.no_grad():
        assert torch.equal(net(defective), net(defective * 7.5))


def test_a_batch_of_two_is_two_batches_of_one() -> None:
    defective = shell(ODD, 2, bite=True).double()
    net = SparseCompletionNet(SMALL).double().eval()
    with torch.no_grad():
        both = net(defective)
        singles = torch.cat([net(defective[:1]), net(defective[1:])])
    torch.testing.assert_close(both, singles, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["empty", "full"])
@pytest.mark.parametrize("shape", [(16, 16, 16), (5, 9, 3)])
def test_empty_and_full_inputs(value: float, shape: tuple[int, int, int]) -> None:
    volume = torch.full((2, 1, *shape), value)
    net = SparseCompletionNet(SMALL)
    levels = net.train()(volume, volume)
    SparseCompletionLoss()(levels, volume).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())
    if value:
        assert [len(level) for level in levels] == [2 * torch.Size(s).numel() for s in shapes_of(shape)]
    with torch.no_grad():
        result = net.eval()(volume)
    assert result.shape == volume.shape
    assert bool(result.isfinite().all())


def test_one_voxel_at_the_coarsest_level_trains() -> None:
    """The trap of batch 1 at 64^3: batch norm in training meets a single row."""
    volume = shell((64, 64, 64), bite=True)
    net = SparseCompletionNet(SMALL).train()
    SparseCompletionLoss()(net(volume, shell((64, 64, 64))), shell((64, 64, 64))).backward()
    used = [name for name, p in net.named_parameters() if p.grad is not None]
    assert len(used) == len([name for name, _ in net.named_parameters() if not name.startswith("final")])


@pytest.mark.slow
def test_it_learns_to_complete_a_shape() -> None:
    complete, defective = shell((24, 20, 22), 2), shell((24, 20, 22), 2, bite=True)
    net, loss = SparseCompletionNet((4, 4, 8, 8, 8, 8, 8)), SparseCompletionLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, amsgrad=True)
    for _ in range(60):
        optimizer.zero_grad()
        loss(net.train()(defective, complete), complete).backward()
        optimizer.step()
    for part in net.modules():  # what it saw in training is what it is asked: judge with the statistics of the batch
        part.train(isinstance(part, nn.BatchNorm3d))
    with torch.no_grad():
        found = net(defective) > 0
    implant, wanted = found & (defective == 0), (complete - defective) > 0
    dice = 2 * float((implant & wanted).sum()) / float(implant.sum() + wanted.sum())
    assert dice > 0.8


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.slow
def test_checkpointing_changes_memory_and_nothing_else(amp: bool) -> None:
    target, torn = shell((64, 60, 49), 2), shell((64, 60, 49), 2, bite=True)
    found, peaks = [], []
    for use_checkpoint in (False, True):
        torch.manual_seed(3)
        net = SparseCompletionNet(use_checkpoint=use_checkpoint)
        for head in net.heads:
            nn.init.constant_(head.bias, -3.0)  # mostly the target's voxels go on, as in a trained network
        loss = SparseCompletionLoss()
        for _ in range(2):
            net.zero_grad()
            with measure_peak() as meter, torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss(net(torn, target), target).backward()
        peaks.append(meter.peak_bytes)
        found.append([*(p.grad for p in net.parameters() if p.requires_grad), *net.buffers()])
    for plain, lean in zip(*found, strict=True):
        assert torch.equal(plain, lean)
    assert peaks[1] < 0.9 * peaks[0]


def test_bad_calls_are_refused() -> None:
    net, volume = SparseCompletionNet(SMALL), shell((16, 16, 16))
    with pytest.raises(ValueError, match=r"call network\(x, target\)"):
        net(volume)
    with pytest.raises(ValueError, match=r"target must lie on the grid of the input.*\(1, \(16, 16, 16\).*got \(2, "):
        net(volume, shell((16, 16, 16), 2))
    with pytest.raises(ValueError, match=r"got \(1, \(8, 16, 16\)"):
        net(volume, volume[:, :, :8])
    with pytest.raises(ValueError, match=r"\(B, 1, H, W, D\), got \(1, 2, 16, 16, 16\)"):
        net(volume.expand(-1, 2, -1, -1, -1), volume)
    with pytest.raises(ValueError, match=r"seven positive numbers \(strides 1 ... 64\), got"):
        SparseCompletionNet((1, 2, 3))
    with pytest.raises(ValueError, match="channels must be a sequence of whole numbers of at least 1, got"):
        SparseCompletionNet((1, 2, 3, 4, 5, 6, 0))


# --- SparseUNet

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "residual": {"num_res_units": 2, "norm": "batch"},
    "group": {"num_res_units": 1, "norm": ("group", {"num_groups": 2}), "act": "relu", "out_channels": 4},
    "asymmetric strides": {"strides": ((2, 2, 1), (1, 2, 2)), "num_res_units": 2},
    "odd kernels": {"kernel_size": 5, "up_kernel_size": 3, "norm": "batch"},
    "flat kernels": {"kernel_size": (3, 3, 1), "up_kernel_size": (3, 3, 1), "strides": ((2, 2, 1), (2, 2, 1))},
    "stride one": {"strides": (1, 2), "act": ("leakyrelu", {"negative_slope": 0.2}), "bias": False},
    "ordering": {"adn_ordering": "AN", "num_res_units": 2, "norm": ("instance", {"affine": True})},
    "deeper": {"channels": (2, 4, 4, 6), "strides": (2, 2, 2), "num_res_units": 2},
}


def settings(name: str) -> dict[str, object]:
    """Arguments of MONAI's UNet."""
    common = {"spatial_dims": 3, "in_channels": 2, "out_channels": 3, "channels": (4, 6, 8), "strides": (2, 2)}
    return {**common, **CONFIGURATIONS[name]}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_unet_on_full_masks_is_monais(name: str, training: bool) -> None:
    dense = UNet(**settings(name)).double().train(training)
    sparse = SparseUNet(**settings(name)).double().train(training)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    image = asymmetric((2, 2, 16, 8, 24))
    assert_same_as_dense(sparse, dense, image, modules=(sparse, dense))


@pytest.mark.parametrize("shape", [(16, 8, 24), (13, 10, 7), (1, 5, 2)], ids=str)
@pytest.mark.parametrize("units", [0, 2])
def test_unet_on_active_voxels_is_a_masked_dense_one(shape: tuple[int, int, int], units: int) -> None:
    """With odd extents and an empty item, against an emulation that masks every layer of a dense network."""
    common = {**settings("plain"), "num_res_units": units}
    sparse, dense = SparseUNet(**common).double(), UNet(**common).double()
    mask = random_mask(3, shape, 0.3, empty_item=1)
    image = asymmetric((3, 2, *shape)) * mask

    def emulated(x: Tensor) -> Tensor:
        return MaskedDense(mask.double()).run(dense.model, x * mask)

    def ours(x: Tensor) -> Tensor:
        return sparse(SparseTensor.from_dense(x, mask)).dense()

    assert_same_as_dense(ours, emulated, image, modules=(sparse, dense), where=mask)


def test_unet_activity_rules_and_inactive_logits() -> None:
    image = asymmetric((1, 2, 8, 8, 8)).float()
    for options, active in (
        ({"threshold": 0.5}, (image > 0.5).any(1)),
        ({"background": float(image[0, 0, 0, 0, 0])}, (image != image[0, 0, 0, 0, 0]).any(1)),
    ):
        net = SparseUNet(**settings("plain"), **options).eval()
        logits = net(image)
        inactive = logits.movedim(1, -1)[~active]
        assert torch.equal(inactive, torch.tensor([10.0, 0.0, 0.0]).expand_as(inactive))
        assert bool(logits.movedim(1, -1)[active].abs().gt(0).any())
    one = SparseUNet(**{**settings("plain"), "out_channels": 1})
    assert one.inactive_logits == (-10.0,)
    own = SparseUNet(**settings("plain"), threshold=2.0, inactive_logits=(1.0, 2.0, 3.0))
    assert own(image)[0, :, 4, 4, 4].tolist() == [1.0, 2.0, 3.0]


def test_unet_refuses_bad_settings() -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 3, got 2"):
        SparseUNet(**{**settings("plain"), "spatial_dims": 2})
    with pytest.raises(ValueError, match=r"must have 3 values \(out_channels\), got \(1.0,\)"):
        SparseUNet(**settings("plain"), inactive_logits=(1.0,))
    with pytest.raises(TypeError, match="has no sparse twin"):
        SparseUNet(**{**settings("plain"), "act": "mish"})


@pytest.mark.slow
def test_unet_trains_in_bfloat16_and_in_less_memory() -> None:
    image = torch.randn(1, 2, 48, 48, 48) * (torch.rand(1, 1, 48, 48, 48) < 0.03)
    peaks = []
    for kind in (SparseUNet, UNet):
        net = kind(**{**settings("residual"), "channels": (8, 8, 8)})
        with measure_peak() as meter, torch.autocast("cpu", dtype=torch.bfloat16):
            net(image)[:, 1].float().mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
        peaks.append(meter.peak_bytes)
    assert peaks[0] < 0.5 * peaks[1]

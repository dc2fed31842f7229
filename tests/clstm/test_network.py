"""CLSTMUNet: the paper's size, gradients of the plain unrolled network, statistics moved once, less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch.utils.flop_counter import FlopCounterMode

from monai_memeff.clstm import CLSTMUNet, SliceUNet
from monai_memeff.memory import measure_peak
from tests.clstm.reference import plain_unet, unrolled
from tests.oracles import assert_less_memory, assert_same_as_whole, assert_tensors_agree, asymmetric

SMALL: dict[str, Any] = {"channels": (2, 3, 4, 5, 6)}


def network(seed: int = 0, **options: Any) -> CLSTMUNet:
    """A small network in float64 in which every parameter matters."""
    torch.manual_seed(seed)
    net = CLSTMUNet(**{**SMALL, **options}).double()
    for name, parameter in net.named_parameters():
        if "cell" in name or "head" in name:
            torch.nn.init.uniform_(parameter, -0.6, 0.7)
    return net


def volume(*shape: int) -> torch.Tensor:
    return asymmetric(shape or (1, 1, 18, 21, 5))


# Size


def test_parameters_of_both_readings() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in SliceUNet(1, 1, up_conv=up).parameters()) for up in (False, True)]
        whole = sum(p.numel() for p in CLSTMUNet().parameters())
    assert counts == [31_389_569, 31_044_289]
    assert [round(c / 1e6, 2) for c in counts] == [31.39, 31.04]
    assert whole == 31_389_569 + 3 * 65 + 4 * 9 + 4 + 2  # three more gate maps, hidden kernels, their biases, head


# Same as the plain network

MODES: dict[str, dict[str, Any]] = {
    "nothing": {"checkpoint": None, "unet_batch": 3},
    "slice": {"checkpoint": "slice"},
    "sqrt": {"checkpoint": "sqrt"},
    "two": {"checkpoint": 2, "offload_to_cpu": True},
    "more than there are": {"checkpoint": 50},
    "half": {"checkpoint": "slice", "recompute": 0.5, "offload_to_cpu": True},
    "no convolution": {"checkpoint": 2, "recompute": 0.0},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"head": False, "axis": 1},
        {"bidirectional": True, "hidden_channels": 2, "out_channels": 3, "axis": 0, "in_channels": 2},
        {"bidirectional": True, "head": False, "norm": "instance", "up_conv": True, "axis": -1, "kernel_size": 5},
    ],
    ids=["as published", "literal", "both ways", "both ways, literal"],
)
@pytest.mark.slow
def test_gradients_and_statistics_are_those_of_the_plain_network(kind: dict[str, Any], mode: str) -> None:
    net = network(**kind, **MODES[mode])
    plain = network(**kind)
    x = volume(2, kind.get("in_channels", 1), 9, 11, 7)
    assert_same_as_whole(net, lambda x: unrolled(plain, x), x, modules=(net, plain))


@pytest.mark.parametrize("shape", [(1, 1, 18, 21, 1), (1, 1, 1, 1, 3), (1, 1, 16, 16, 2), (1, 1, 33, 5, 13)])
def test_any_extents(shape: tuple[int, ...]) -> None:
    net = network(bidirectional=True)
    x = volume(*shape)
    assert net(x).shape == shape
    assert_same_as_whole(net, lambda x: unrolled(net, x), x, modules=(net, net))


def test_padding_repeats_the_edge_and_changes_nothing_that_needs_none() -> None:
    unet = SliceUNet(1, 2, (2, 3, 4)).double().eval()
    x = volume(1, 1, 8, 12)
    padded = torch.nn.functional.pad(x[..., :7, :10], (0, 2, 0, 1), mode="replicate")
    torch.testing.assert_close(unet(x[..., :7, :10]), unet(padded)[..., :7, :10])


def test_evaluation_does_not_depend_on_how_many_slices_pass_together() -> None:
    nets = [network(unet_batch=n).eval() for n in (1, 4)]
    with torch.no_grad():
        torch.testing.assert_close(nets[0](volume()), nets[1](volume()), rtol=1e-10, atol=1e-12)


def test_running_statistics_move_once_per_slice() -> None:
    net = network(checkpoint=2)
    net(volume()).sum().backward()
    counts = {name: int(b) for name, b in net.named_buffers() if name.endswith("tracked")}
    assert counts
    assert set(counts.values()) == {5}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_single_slices(momentum: float | None) -> None:
    layers = [SliceUNet(1, 1, (3, 4)).encoder[0].first.norm.double() for _ in range(2)]
    for layer in layers:
        layer.momentum = momentum
    x = volume(2 * 3, 3, 4, 5)  # two volumes of three slices
    together = layers[0](x, 3)
    alone = torch.stack([layers[1](part) for part in x.unflatten(0, (2, 3)).unbind(1)], 1).flatten(0, 1)
    assert_tensors_agree(
        {"y": together, **dict(layers[0].named_buffers())}, {"y": alone, **dict(layers[1].named_buffers())}
    )


@pytest.mark.parametrize("up_conv", [False, True], ids=["concatenate", "2x2 convolution"])
def test_the_unet_computes_what_the_paper_draws(up_conv: bool) -> None:
    """Upsampling and concatenation are folded into two convolutions; values, gradients and statistics stay."""
    nets = [SliceUNet(2, 3, (2, 3, 5), up_conv=up_conv).double() for _ in range(2)]
    x = volume(2, 2, 12, 20)
    assert_same_as_whole(nets[0], lambda x: plain_unet(nets[1], x), x, modules=(nets[0], nets[1]))


@pytest.mark.slow
def test_folding_upsampling_saves_multiplications_and_memory() -> None:
    with torch.device("meta"):
        unet, x = SliceUNet(1, 4), torch.zeros(1, 1, 512, 512)
        found = []
        for run in (unet, lambda x: plain_unet(unet, x)):
            with FlopCounterMode(display=False) as counter:
                run(x)
            found.append(counter.get_total_flops() / 2e9)
    assert found[1] == pytest.approx(222.5, abs=0.2)  # billion multiplications per slice, as published
    assert found[0] == pytest.approx(sum(cost for _, cost in unet.costs()) * 512 * 512 / 1e9, rel=0.02)
    assert found[0] < 0.82 * found[1]
    unet, x = SliceUNet(1, 4, (8, 16, 32)), torch.rand(1, 1, 64, 64)
    assert_less_memory(lambda: unet(x), lambda: plain_unet(unet, x), 0.9)


# Frozen


def test_a_frozen_unet_stays_and_the_rest_learns() -> None:
    net = network(hidden_channels=2)
    net.freeze_unet()
    net.train()
    before = copy.deepcopy(net.state_dict())
    plain = copy.deepcopy(net)
    assert_same_as_whole(net, lambda x: unrolled(plain, x), volume(), modules=(net, plain))
    x = volume()
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    once = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert once < 1.5 * counter.get_total_flops()  # the U-Net runs forward and that is all
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.unet.parameters())
    assert all(p.grad is not None for p in net.cell.parameters())
    net.freeze_unet(False)
    assert net.unet.training
    assert all(p.requires_grad for p in net.unet.parameters())


# Cost


def flops(net: CLSTMUNet, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", [0.7, 0.5, 0.1])
def test_it_repeats_no_more_than_it_is_allowed(recompute: float) -> None:
    options = {"channels": (4, 8, 16, 32), "norm": "instance"}
    x = volume(1, 1, 32, 32, 2)
    plain, everything, some = (
        flops(network(**options, **mode), x)
        for mode in ({"checkpoint": None}, {"checkpoint": "slice"}, {"checkpoint": "slice", "recompute": recompute})
    )
    assert everything > plain
    assert (some - plain) / (everything - plain) <= recompute + 0.02  # the cells are always repeated
    assert some > plain


def peak(net: CLSTMUNet, depth: int) -> int:
    x = torch.rand(1, 1, 32, 32, depth)
    net(x[..., :1]).sum().backward()  # gradients exist
    with measure_peak() as meter:
        net(x).sum().backward()
    return meter.peak_bytes


@pytest.mark.slow
def test_memory_grows_with_the_states_and_not_with_the_activations() -> None:
    slopes = {}
    for checkpoint in (None, "slice"):
        net = network(channels=(8, 16, 32), checkpoint=checkpoint).float()
        slopes[checkpoint] = (peak(net, 12) - peak(net, 4)) / 8
    maps = slopes["slice"] / (32 * 32 * 4)
    assert maps <= 2 + 2 + 1  # h, c, logits in pieces and joined, one in passing
    assert slopes[None] > 20 * slopes["slice"]


# What goes in and comes out


def test_metadata_goes_through() -> None:
    x = MetaTensor(torch.rand(1, 1, 17, 16, 3), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])))
    y = network().float()(x)
    assert torch.equal(y.affine, x.affine)


def test_autocast_keeps_the_states_in_float32() -> None:
    net = network().float().eval()
    x = torch.rand(1, 1, 32, 32, 4)
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            _, (h, c) = net.sweep(x)
            rough = net(x)
    assert (h.dtype, c.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.rand(1, 1, 16, 16),
            r"takes \(B, 1, H, W, D\) .*, got \(1, 1, 16, 16\); a single slice .* is ",
        ),
        (torch.rand(1, 2, 16, 16, 4), r"takes \(B, 1, H, W, D\)"),
        (torch.rand(1, 1, 16, 16, 0), "at least one voxel"),
        (torch.full((1, 1, 16, 16, 2), torch.nan), "finite values, got 512 NaN or infinite"),
        (torch.full((1, 1, 16, 16, 2), torch.inf), "finite values, got 512 NaN or infinite"),
    ],
    ids=["2D", "channels", "empty", "NaN", "infinite"],
)
def test_bad_volumes_are_refused_in_one_line(x: torch.Tensor, message: str) -> None:
    net = network().float()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        net(x)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_state_of_another_plane_is_refused() -> None:
    net = network().float()
    _, state = net.sweep(torch.rand(1, 1, 16, 16, 2))
    with pytest.raises(ValueError, match="does not fit a slab"):
        net.sweep(torch.rand(1, 1, 16, 17, 2), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_dims": 2}, "must be 3, got 2"),
        ({"head": False, "hidden_channels": 4}, r"hidden_channels \(4\) must equal out_channels \(1\)"),
        ({"checkpoint": "slices"}, "checkpoint must be"),
        ({"checkpoint": 0}, "checkpoint must be"),
        ({"axis": 3}, "axis must be a whole number in -3"),
        ({"recompute": 1.5}, "recompute in 0"),
        ({"unet_batch": 0}, "unet_batch be at least 1"),
        ({"recompute": 0.5, "checkpoint": None}, "set checkpoint"),
        ({"channels": (4,)}, "two or more levels"),
        ({"hidden_channels": 0}, "hidden_channels must be a whole number of at least 1"),
        ({"kernel_size": 2}, "kernel_size odd"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLSTMUNet(**{**SMALL, **options})

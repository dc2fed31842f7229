"""MinkowskiEngine checkpoints: kernels reordered, the published network converted, misfits listed, the command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monai_memeff import cli
from monai_memeff.sparse import SparseCompletionNet, SparseTensor
from monai_memeff.sparse.networks.minkowski_weights import (
    channels_of,
    convert_file,
    from_minkowski,
    kernel_to_weight,
    to_minkowski,
    weight_to_kernel,
)
from tests.oracles import assert_tensors_agree

EXAMPLE = Path(__file__).with_name("minkowski_completion.pt")
"""Written by MinkowskiEngine itself: python tests/benchmarks/minkowski_reference.py tests/sparse/..."""

CHANNELS = (2, 2, 3, 3, 2, 4, 5)


@pytest.fixture
def example() -> dict:
    return torch.load(EXAMPLE, weights_only=True)


def completion_net() -> SparseCompletionNet:
    """A network whose batch norms have seen something."""
    net = SparseCompletionNet(CHANNELS)
    for name, entry in net.state_dict().items():
        if "running_var" in name:
            entry.uniform_(0.5, 1.5)
        elif entry.is_floating_point():
            entry.uniform_(-0.5, 0.5)
    return net


def test_the_converted_network_gives_minkowski_engines_logits(example: dict) -> None:
    net = SparseCompletionNet(channels_of(example["state_dict"]))
    assert net.channels == CHANNELS
    net.load_state_dict(from_minkowski(example["state_dict"], net), strict=True)
    coordinates = example["coordinates"].long()
    x = SparseTensor(torch.ones(len(coordinates), 1), coordinates, example["spatial_shape"])
    with torch.no_grad():
        ours = net.eval()(x)
    assert len(ours) == example["candidates"]
    found = dict(zip(map(tuple, ours.coordinates.tolist()), ours.features[:, 0].tolist(), strict=True))
    logits = torch.tensor([found[tuple(place)] for place in example["places"].tolist()])
    assert_tensors_agree({"logits": logits}, {"logits": example["logits"]})


def test_there_and_back_changes_nothing(example: dict) -> None:
    net = completion_net()
    assert_same_state(from_minkowski(to_minkowski(net), net), net.state_dict())
    net.load_state_dict(from_minkowski(example["state_dict"], net))
    assert_same_state(to_minkowski(net), example["state_dict"])


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_names_and_prefixes_do_not_matter(example: dict) -> None:
    state = example["state_dict"]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    renamed = {f"module.x{layers.index(n.rpartition('.')[0])}.{n.rpartition('.')[2]}": v for n, v in state.items()}
    net = SparseCompletionNet(CHANNELS)
    assert_same_state(from_minkowski(renamed, net), from_minkowski(state, net))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 2, 2), (3, 1, 2)])
def test_kernels_place_by_place(size: tuple[int, int, int], transposed: bool) -> None:
    """Entry (i, j, k) of a weight is row i + I (j + J k) of the kernel."""
    shape = (4, 5, *size) if transposed else (5, 4, *size)
    weight = torch.arange(20 * size[0] * size[1] * size[2], dtype=torch.float32).view(shape)
    kernel = weight_to_kernel(weight, transposed)
    assert kernel.shape == ((4, 5) if size == (1, 1, 1) else (size[0] * size[1] * size[2], 4, 5))
    rows = kernel.view(-1, 4, 5)
    for i, j, k in torch.cartesian_prod(*map(torch.arange, size)).tolist():
        part = weight[:, :, i, j, k]
        assert torch.equal(rows[i + size[0] * (j + size[1] * k)], part if transposed else part.t())
    assert torch.equal(kernel_to_weight(kernel, size, transposed), weight)


def test_misfits_are_listed(example: dict) -> None:
    state, net = example["state_dict"], SparseCompletionNet(CHANNELS)
    wide = SparseCompletionNet((2, 2, 3, 3, 2, 4, 6))
    with pytest.raises(ValueError, match=r"enc_block_s32s64.0 -> encoder.5.0.0.weight: \(5, 4, 2, 2, 2\) in the check"):
        from_minkowski(state, wide)
    short = {name: value for name, value in state.items() if not name.startswith("final_out")}
    with pytest.raises(ValueError, match="56 layers in the checkpoint, 57 in the network"):
        from_minkowski(short, net)
    bare = {name: value for name, value in state.items() if name != "dec_s1_cls.bias"}
    with pytest.raises(ValueError, match=r"dec_s1_cls -> heads\.5: no bias in the checkpoint"):
        from_minkowski(bare, net)
    biased = {**state, "enc_block_s1.0.bias": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=r"enc_block_s1\.0 -> stem\.0: the network has no bias"):
        from_minkowski(dict(sorted(biased.items(), key=lambda item: not item[0].startswith("enc_block_s1."))), net)
    wrong = {**state, "enc_block_s1.0.kernel": torch.zeros(8, 1, 2)}
    with pytest.raises(ValueError, match=r"must be \(27, in, out\), got \(8, 1, 2\).*channels it was trained with"):
        from_minkowski(wrong, net)
    with pytest.raises(ValueError, match=r"at least 13 convolutions.*got 0"):
        channels_of(net.state_dict())
    foreign = {f"embedding{number}.table": torch.zeros(2) for number in range(50)}
    with pytest.raises(ValueError, match=r"embedding0: neither a convolution nor a batch norm;.*and \d+ more"):
        from_minkowski(foreign, net)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run `memeff` as `main` does; exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["memeff", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_the_command(
    example: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"epoch": 3, "state_dict": example["state_dict"]}, tmp_path / "theirs.pth")
    target = tmp_path / "new" / "ours.pt"
    status, out, _ = run(monkeypatch, capsys, "convert", tmp_path / "theirs.pth", target)
    assert status == 0
    assert "channels=(2, 2, 3, 3, 2, 4, 5)" in out
    expected, _ = convert_file(str(tmp_path / "theirs.pth"))
    assert_same_state(torch.load(target, weights_only=True), expected)
    words = ("convert", tmp_path / "theirs.pth", target, "--channels", "2,2,3,3,2,4,5")
    assert run(monkeypatch, capsys, *words)[0] == 0


def test_the_command_refuses_in_one_line(
    example: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(example["state_dict"], tmp_path / "theirs.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "words.pth").write_text("not a checkpoint")
    cases = {
        "channels must be seven": ("theirs.pth", "--channels", "1,2"),
        "takes seven numbers with commas": ("theirs.pth", "--channels", "a,b"),
        "does not fit": ("theirs.pth", "--channels", "2,2,3,3,2,4,6"),
        "no such file": ("absent.pth",),
        "holds no state dict": ("list.pth",),
        "is not a checkpoint, or a damaged one": ("words.pth",),
    }
    for reason, (name, *options) in cases.items():
        status, _, err = run(monkeypatch, capsys, "convert", tmp_path / name, tmp_path / "out.pt", *options)
        assert (status, len(err.strip().splitlines())) == (2, 1), reason
        assert reason in err.lower()
        assert not (tmp_path / "out.pt").exists()

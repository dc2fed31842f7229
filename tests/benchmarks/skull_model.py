"""The shipped skull-completion model: the heads it learns from, and how it completes heads that it never saw.

    python tests/benchmarks/skull_model.py heads --data ../shared/data --output heads      # masks, one file per head
    python -m monai.bundle run --config_file "['configs/train.json', 'configs/pretrain.json']" --dataset_dir heads ...
    python tests/benchmarks/skull_model.py dense --heads heads --without real_vhf --seconds 320 --output dense.pt
    python tests/benchmarks/skull_model.py score --heads heads --head real_vhf --weights models/last.pt --dense dense.pt
    python tests/benchmarks/skull_model.py figure --heads heads --head real_vhf --weights models/last.pt --output it.png

`heads` writes binary skulls: generated ones (another seed is another head) and, where the folder of real images is at
hand, four real ones. `score` cuts defects of every kind into one head, completes them, and compares the implants with
those of the registered mirror and of a dense U-Net, which `dense` trains on the same samples for a given time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

REAL = {
    "real_vhf": ("head_ct/vhf_head_ct.nii.gz", 300.0),
    "real_philips": ("head_ct/philips_skull_phantom_bone1mm.nii.gz", 300.0),
    "real_mr": ("head_mr_seg3d/skull.nii.gz", 0.5),
    "real_template": ("head_ct_template/scct.nii", 3300.0),  # not Hounsfield units: soft tissue is stretched
}
"""Name -> file below the data folder, bone at and above this value."""

VIEWS, LEVEL = 16, 0.4  # the bundle's defaults
GENERATED_MM = 2.0
POOL = {64: 4, 128: 2, 256: 1}


def write_heads(data: Path | None, output: Path, count: int) -> None:
    """Write the masks of all heads as NIfTI, uint8."""
    import nibabel as nib

    from monai_memeff.apps.skull.phantom import HEAD_LABELS, head_phantom

    output.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        head = head_phantom((96, 116, 124), GENERATED_MM, seed)
        bone = (head.labels == HEAD_LABELS["skull"]) | (head.labels == HEAD_LABELS["jaw"])
        nib.save(
            nib.Nifti1Image(bone.numpy().astype(np.uint8), head.affine.numpy()), output / f"generated_{seed:03d}.nii.gz"
        )
    for name, (file, threshold) in REAL.items() if data is not None else ():
        image = nib.load(data / file)
        bone = np.asarray(image.dataobj) >= threshold
        nib.save(nib.Nifti1Image(bone.astype(np.uint8), image.affine), output / f"{name}.nii.gz")


def on_grid(path: Path, grid: int) -> torch.Tensor:
    """A head as the bundle brings it onto its grid: (1, grid, grid, grid)."""
    from monai.bundle import ConfigParser
    from monai.transforms import Compose

    config = Path(__file__).resolve().parents[2] / "bundles/skull_completion_sparse/configs/train.json"
    parser = ConfigParser()
    parser.read_config(str(config))
    parser.update({"grid": grid, "cell_mm": 256 / grid, "pool": POOL[grid], "bone_threshold": 0.5})
    return Compose(parser.get_parsed_content("train#deterministic_transforms"))({"skull": str(path)})["skull"]


def dense_unet() -> torch.nn.Module:
    """The demo's dense U-Net, which completes a skull."""
    from monai.networks.nets.unet import UNet

    return UNet(3, 1, 1, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")


def train_dense(
    heads: list[Path], grid: int, seconds: float, batch_size: int, start: Path | None, output: Path
) -> None:
    """Train the dense U-Net on varied heads with random defects for given CPU-seconds, and write its weights."""
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, RandFlipd, RandSpatialCropd, SpatialPadd

    from monai_memeff.apps.skull import RandSkullDefectd, RandSkullVariationd

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    real = [path for path in heads if path.name.startswith("real")]
    items = [{"skull": on_grid(path, grid)} for path in heads + 5 * real] * 8
    shift = 2 * (grid // 32)
    draw = Compose(
        [
            RandSkullVariationd("skull"),
            SpatialPadd("skull", [grid + shift] * 3),
            RandSpatialCropd("skull", [grid] * 3, random_size=False),
            RandFlipd("skull", 0.5, 0),
            RandSkullDefectd("skull", size=(0.08, 0.16)),
        ]
    )
    loader = DataLoader(Dataset(items, draw), batch_size=batch_size, shuffle=True)
    network = dense_unet().to(device).train()
    if start is not None:
        network.load_state_dict(torch.load(start, weights_only=True, map_location=device)["model"])
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    began, steps = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(0.02, 0.5 * (1 + math.cos(math.pi * spent / seconds)))
        for batch in loader:
            defective, skull = (batch[key].as_tensor().float().to(device) for key in ("defective", "skull"))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(defective), skull)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if time.process_time() - began > seconds:
                break
        print(f"step {steps}, {time.process_time() - began:.0f} s, loss {loss.item():.4f}", flush=True)
    torch.save({"model": network.state_dict(), "steps": steps, "seconds": seconds}, output)


def score(
    head: torch.Tensor, weights: Path, dense: Path | None, defects: int, seed: int
) -> dict[str, dict[str, float]]:
    """Mean scores of the networks, in one view and averaged over the bundle's, and of the registered mirror."""
    from monai.transforms import KeepLargestConnectedComponent

    from monai_memeff.apps.skull import RandSkullDefect, ViewAveragingInferer
    from monai_memeff.apps.skull.demo.mirror import mirror_implant
    from monai_memeff.apps.skull.metrics import implant_scores
    from monai_memeff.sparse import SparseCompletionNet

    networks = {"sparse": (SparseCompletionNet(), weights)} | (
        {} if dense is None else {"dense": (dense_unet(), dense)}
    )
    for network, file in networks.values():
        state = torch.load(file, weights_only=True, map_location="cpu")
        network.load_state_dict(state.get("model", state))
        network.eval()
    cell_mm = 256 / head.shape[-1]
    largest = KeepLargestConnectedComponent()
    ways = {"": ViewAveragingInferer(views=1), "_views": ViewAveragingInferer(views=VIEWS, level=LEVEL)}
    names = [name + way for name in networks for way in ways]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*names, "mirror")}
    for kind in ("sphere", "cube", "freeform"):
        cut = RandSkullDefect(kind, (0.08, 0.16))
        cut.set_random_state(seed)
        for _ in range(defects):
            defective, implant = (x.as_tensor().float() for x in cut(head))
            got = {"mirror": torch.from_numpy(mirror_implant(defective[0].numpy() > 0, head.affine.numpy()).implant)}
            for (name, (network, _)), (way, inferer) in itertools.product(networks.items(), ways.items()):
                with torch.no_grad():
                    completed = inferer(defective[None], network)[0] > 0
                got[name + way] = largest((completed & (defective == 0)).float())[0] > 0
            for name, mask in got.items():
                found[name].append(implant_scores(mask, implant[0] > 0, defective[0] > 0, cell_mm))
    return {n: {k: float(np.mean([s[k] for s in rows])) for k in rows[0]} for n, rows in found.items()}


def draw(head: torch.Tensor, weights: Path, seed: int, output: Path) -> None:
    """Slices through one defect of every kind: what was removed as a line, what the network adds in color."""
    from matplotlib.figure import Figure
    from monai.transforms import KeepLargestConnectedComponent

    from monai_memeff.apps.skull import RandSkullDefect
    from monai_memeff.apps.skull.metrics import implant_scores
    from monai_memeff.sparse import SparseCompletionNet

    network = SparseCompletionNet().eval()
    state = torch.load(weights, weights_only=True, map_location="cpu")
    network.load_state_dict(state.get("model", state))
    figure = Figure(figsize=(9, 9.4), layout="constrained")
    axes = figure.subplots(3, 3)
    for row, kind in zip(axes, ("sphere", "cube", "freeform"), strict=True):
        cut = RandSkullDefect(kind, (0.08, 0.16))
        cut.set_random_state(seed)
        defective, implant = (x.as_tensor().float() for x in cut(head))
        with torch.no_grad():
            completed = network(defective[None])[0] > 0
        added = KeepLargestConnectedComponent()((completed & (defective == 0)).float())[0] > 0
        dice = implant_scores(added, implant[0] > 0, defective[0] > 0, 256 / head.shape[-1])["implant_dice"]
        middle = [int(places.float().mean()) for places in torch.nonzero(implant[0], as_tuple=True)]
        for axis, (ax, at) in enumerate(zip(row, middle, strict=True)):
            bone, truth, found = (x.select(axis, at).T.numpy() for x in (defective[0] > 0, implant[0] > 0, added))
            picture = np.full((*bone.shape, 3), 1.0)
            picture[bone], picture[found] = (0.45, 0.45, 0.45), (0.95, 0.6, 0.2)
            ax.imshow(picture, origin="lower", interpolation="nearest")
            if truth.any() and not truth.all():
                ax.contour(truth, [0.5], colors="#1f4e9e", linewidths=1.5)
            ax.set_axis_off()
        row[0].set_title(f"{kind}, implant Dice {dice:.2f}", fontsize=10, loc="left")
    figure.supxlabel("gray: remaining bone; line: removed bone; orange: the network's implant", fontsize=9)
    figure.savefig(output, dpi=90)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    heads = commands.add_parser("heads")
    heads.add_argument("--data", type=Path, help="folder of real images; without it, generated heads only")
    heads.add_argument("--output", type=Path, required=True)
    heads.add_argument("--count", type=int, default=24, help="generated heads")
    dense = commands.add_parser("dense")
    dense.add_argument("--heads", type=Path, required=True)
    dense.add_argument("--without", default="none", help="leave out heads with this in their name")
    dense.add_argument("--grid", type=int, default=64, choices=POOL)
    dense.add_argument("--seconds", type=float, required=True, help="of the CPU, on one thread")
    dense.add_argument("--batch-size", type=int, default=16)
    dense.add_argument("--start", type=Path, help="weights to go on from")
    dense.add_argument("--output", type=Path, required=True)
    scores = commands.add_parser("score")
    scores.add_argument("--heads", type=Path, required=True)
    scores.add_argument("--head", required=True)
    scores.add_argument("--weights", type=Path, required=True)
    scores.add_argument("--dense", type=Path, help="weights of the dense U-Net")
    scores.add_argument("--grid", type=int, default=64, choices=POOL)
    scores.add_argument("--defects", type=int, default=4, help="of every kind")
    scores.add_argument("--seed", type=int, default=7)
    scores.add_argument("--jsonl", type=Path, help="append the row")
    figure = commands.add_parser("figure")
    figure.add_argument("--heads", type=Path, required=True)
    figure.add_argument("--head", required=True)
    figure.add_argument("--weights", type=Path, required=True)
    figure.add_argument("--grid", type=int, default=64, choices=POOL)
    figure.add_argument("--seed", type=int, default=7)
    figure.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "heads":
        write_heads(options.data, options.output, options.count)
        return
    if options.command == "dense":
        files = [path for path in sorted(options.heads.glob("*.nii.gz")) if options.without not in path.name]
        train_dense(files, options.grid, options.seconds, options.batch_size, options.start, options.output)
        return
    head = on_grid(options.heads / f"{options.head}.nii.gz", options.grid)
    if options.command == "figure":
        draw(head, options.weights, options.seed, options.output)
        return
    row = {"head": options.head, "grid": options.grid, "weights": options.weights.name}
    row.update(score(head, options.weights, options.dense, options.defects, options.seed))
    print(json.dumps(row))
    if options.jsonl:
        with options.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

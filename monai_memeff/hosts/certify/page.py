"""The certificate as a page: the verdict, what differs, what it costs, where, and all that was hashed."""

from __future__ import annotations

from typing import Any

from monai_memeff.data.html_page import HtmlPage
from monai_memeff.hosts.certify.pictures import Pictures

WAYS = {"whole": "whole network", "streamed": "streamed by halo", "window": "sliding window"}

READING = (
    "Streaming computes the same sums as the whole network, a part of the volume at a time. Floating-point sums in "
    "another order differ in their last digits, so logits may differ a little; a label differs only where two classes "
    "are equal to that precision. A sliding window is another computation: it shows the network less around each "
    "voxel, and other statistics where the network normalizes over the volume.",
    "Memory is that of tensors: activations and whole tensors in a store, without weights and without the workspace of "
    "single kernels. The process holds more: Python, libraries, the image.",
)


def certificate_page(found: dict[str, Any], pictures: dict[str, Pictures], json_sha256: str) -> HtmlPage:
    """The page of a certificate.

    Args:
        found: content of ``certificate.json``.
        pictures: way -> sections of where it differs; "labels" -> sections of the reference.
        json_sha256: hash of ``certificate.json``.
    """
    page = HtmlPage(f"Certificate: {found['model']['name']}")
    page.verdict(found["verdict"]["sentence"], found["verdict"]["kind"])
    if found["window_sentence"]:
        page.sentences(found["window_sentence"])
    page.heading("What differs, and what it costs")
    page.table(["", *(WAYS[way] for way in found["runs"])], _rows(found), "One run of each way on this machine.")
    page.sentences(*READING)
    if found["notes"]:
        page.items(found["notes"])
    _show(page, found, pictures)
    page.heading("What was certified")
    page.table(["", "value"], _hashed(found, json_sha256), words=True)
    page.heading("Where it ran")
    words = {**found["machine"], **found["versions"], "date": found["date"]}
    page.table(
        ["", "value"], [[name.removesuffix("_bytes"), _value(name, value)] for name, value in words.items()], words=True
    )
    if found["plan"]:
        page.heading("The plan that was executed")
        page.text(found["plan"]["text"])
    return page


def _show(page: HtmlPage, found: dict[str, Any], pictures: dict[str, Pictures]) -> None:
    reference = WAYS[found["reference"]] if found["reference"] else ""
    for way in ("streamed", "window"):
        difference = found["differences"].get(way)
        if difference is None:
            continue
        page.heading(f"Where the {WAYS[way]} differs" if way == "window" else "Where streaming differs")
        if difference["voxels"] == 0:
            page.sentences(f"Nowhere: all {difference['of']:,} voxels have the label of the {reference}.")
        else:
            page.sentences(f"Red: another label than the {reference}. Tinted: where that one has a label above 0.")
            page.pictures(pictures[way])
    if "labels" in pictures:
        page.heading(f"The labels of the {reference}")
        page.pictures(pictures["labels"])


def _rows(found: dict[str, Any]) -> list[list[str]]:
    ways = list(found["runs"])
    rows: list[list[str]] = []

    def row(name: str, cells: dict[str, str]) -> None:
        if any(cells.values()):
            rows.append([name, *(cells.get(way) or "–" for way in ways)])

    runs, differences = found["runs"], found["differences"]
    row("ran", {way: f"no: {run['refused']}" if run["refused"] else "yes" for way, run in runs.items()})
    reference = {found["reference"]: "the reference"} if found["reference"] else {}
    row("voxels with another label", reference | {way: _voxels(d) for way, d in differences.items()})
    row("largest difference of logits", {way: f"{d['largest_logit_difference']:.3g}" for way, d in differences.items()})
    for name, key in (("peak memory, predicted", "predicted_bytes"), ("peak memory, measured", "peak_bytes")):
        row(name, {way: _size(run[key]) for way, run in runs.items()})
    details = runs.get("streamed", {}).get("details") or {}
    if "planned_device_bytes" in details:
        pair = f"{_size(details['planned_device_bytes'])} planned, {_size(details['measured_device_bytes'])} measured"
        row("of it activations on the device", {"streamed": f"{pair}, in {details['partitions']} parts"})
    row("peak of the whole process or GPU", {way: _size(run["process_bytes"]) for way, run in runs.items()})
    row("seconds", {way: _seconds(run["seconds"]) for way, run in runs.items()})
    row("CPU-seconds", {way: _seconds(run["cpu_seconds"]) for way, run in runs.items()})
    for name in found["dice"].get("classes", ()):
        scores = {way: found["dice"]["runs"][way][name] for way in found["dice"]["runs"]}
        row(f"Dice of {name}", {way: "absent" if score is None else f"{score:.4f}" for way, score in scores.items()})
    return rows


def _hashed(found: dict[str, Any], json_sha256: str) -> list[list[str]]:
    model, image, repeats = found["model"], found["image"], found["repeats"]
    rows = [["model", f"{model['name']} ({model['kind']}), {model['network']}, {model['parameters']:,} parameters"]]
    rows += [[f"file of the model, {file}", sha] for file, sha in model["files"].items()]
    rows.append(["weights in the network, SHA-256", model["state_sha256"]])
    rows += [[f"image, {entry['file']}", entry["sha256"]] for entry in image["files"]]
    rows += [[f"label, {entry['file']}", entry["sha256"]] for entry in found["label"]]
    times = " x ".join(map(str, found["input"]["shape"]))
    padded = f", with zeros around it to {' x '.join(map(str, found['input']['padded_to']))}"
    rows.append(["input of the network", times + (padded if found["input"]["padded"] else "")])
    rows.append(["labels are", found["rule"]])
    if found["plan"]:
        rows.append(["plan, SHA-256 of its text", found["plan"]["sha256"]])
    if repeats["sha256"]:
        different = sorted(set(repeats["sha256"]))
        rows.append([f"{len(repeats['sha256'])} streamed results, SHA-256", "; ".join(different)])
    rows.append(["certificate.json, SHA-256", json_sha256])
    return rows


def _voxels(difference: dict[str, Any]) -> str:
    share = difference["voxels"] / max(difference["of"], 1)
    return f"{difference['voxels']:,} of {difference['of']:,} ({100 * share:.3g}\N{NO-BREAK SPACE}%)"


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _value(name: str, value: Any) -> str:
    return _size(value) if name.endswith("_bytes") else str(value)

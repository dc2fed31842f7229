"""What the runs prove, in one sentence, and whether a script may go on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from monai_memeff.hosts.certify.compare import Difference
from monai_memeff.hosts.certify.runs import Run

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference of logits, over the largest logit, that sums in another order explain, by type."""

HALF_ROUNDING = 5e-2


@dataclass(frozen=True)
class Verdict:
    """The outcome.

    Attributes:
        exact: True where the streamed network is shown to give the labels of the whole one; False where it does not, or
            cannot run; None where this machine cannot tell.
        sentence: in words.
    """

    exact: bool | None
    sentence: str

    @property
    def kind(self) -> str:
        """Of the paragraph on the page."""
        return {True: "good", False: "bad", None: "open"}[self.exact]


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Relative difference of logits that rounding explains; TensorFloat-32 of a GPU is nearly half precision."""
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return HALF_ROUNDING
    return ROUNDING.get(dtype, HALF_ROUNDING)


def judge(
    whole: Run, streamed: Run, found: Difference | None, results: list[str], labels: int, explained: float
) -> Verdict:
    """What the runs prove.

    Args:
        whole: run of the whole network.
        streamed: first streamed run.
        found: their difference; None where one of them did not run.
        results: Hash of every streamed run.
        labels: different labels in the reference.
        explained: relative difference of logits that rounding explains.
    """
    if streamed.refused:
        return Verdict(False, f"Refused: this network cannot be streamed exactly, so it was not: {streamed.refused}.")
    if len(set(results)) > 1:
        return Verdict(
            False,
            f"Not exact: {len(results)} streamed runs gave {len(set(results))} different results. "
            "The network draws random numbers, or a kernel of this device does not repeat its sums.",
        )
    again = f" {len(results)} streamed runs are the same to the last bit." if len(results) > 1 else ""
    if found is None:
        return Verdict(None, f"Not proven on this machine: the whole network {whole.refused}.{again}")
    if found.voxels:
        share = f"{found.voxels:,} of {found.of:,} voxels"
        return Verdict(False, f"Not exact in labels: {share} differ between the streamed and the whole network.")
    same = f"The streamed network gives each of the {found.of:,} voxels the label that the whole network gives"
    if found.largest > explained * found.scale:
        sentence = (
            f"Not exact: the labels of all voxels are the same, but logits differ by up to {found.largest:.3g} "
            f"(largest logit {found.scale:.3g}), more than rounding explains."
        )
        return Verdict(False, sentence)
    logits = (
        "every logit is the same to the last bit"
        if found.identical
        else f"logits differ by at most {found.largest:.2g} (largest logit {found.scale:.3g}), which is rounding"
    )
    alone = " All voxels have one label, so equal labels alone say little." if labels < 2 else ""
    return Verdict(True, f"Exact in labels. {same}; {logits}.{again}{alone}")

"""Which nnU-Net this is: a digest of the source of the functions that lean prediction replaces or imitates."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

KNOWN = {
    "2.8.0": "9bbeff3e9210700290b977e56f58b0fdcaf93577ab255f89893c81c5a594eb76",
    "2.8.1": "55d12483295b87bf7b193de17f404fd7f55cce52b7925555017c412a4d6da31e",
}
"""nnU-Net's version -> digest of :data:`FUNCTIONS` in it."""

FUNCTIONS = {
    "inference/predict_from_raw_data.py": (
        "nnUNetPredictor._internal_get_data_iterator_from_lists_of_filenames",
        "nnUNetPredictor._internal_get_sliding_window_slicers",
        "nnUNetPredictor._internal_maybe_mirror_and_predict",
        "nnUNetPredictor._internal_predict_sliding_window_return_logits",
        "nnUNetPredictor._manage_input_and_output_lists",
        "nnUNetPredictor.predict_from_data_iterator",
        "nnUNetPredictor.predict_from_files",
        "nnUNetPredictor.predict_from_files_sequential",
        "nnUNetPredictor.predict_logits_from_preprocessed_data",
        "nnUNetPredictor.predict_single_npy_array",
        "nnUNetPredictor.predict_sliding_window_return_logits",
    ),
    "inference/export_prediction.py": (
        "convert_predicted_logits_to_segmentation_with_correct_shape",
        "export_prediction_from_logits",
        "resample_and_save",
    ),
    "inference/data_iterators.py": ("preprocess_fromfiles_save_to_queue", "preprocessing_iterator_fromfiles"),
    "inference/sliding_window_prediction.py": ("compute_gaussian", "compute_steps_for_sliding_window"),
    "preprocessing/preprocessors/default_preprocessor.py": (
        "DefaultPreprocessor.run_case",
        "DefaultPreprocessor.run_case_npy",
    ),
    "preprocessing/resampling/default_resampling.py": (
        "determine_do_sep_z_and_axis",
        "resample_data_or_seg",
        "resample_data_or_seg_to_shape",
    ),
    "preprocessing/resampling/no_resampling.py": ("no_resampling_hack",),
    "utilities/helpers.py": ("softmax_helper_dim0",),
    "utilities/label_handling/label_handling.py": (
        "LabelManager.apply_inference_nonlin",
        "LabelManager.convert_logits_to_segmentation",
        "LabelManager.convert_probabilities_to_segmentation",
        "LabelManager.revert_cropping_on_probabilities",
    ),
}


TOTALSEGMENTATOR = {"2.18.0": "a036162eba496537e13a17436be89527673dcaedbf3db5b3d5d59305c4409a8d"}
"""TotalSegmentator's version -> digest of :data:`TOTALSEGMENTATORS`, which do as nnU-Net's when not told otherwise."""

TOTALSEGMENTATORS = {
    "nnunet_runtime_patches.py": (
        "convert_predicted_logits_to_segmentation_with_correct_shape",
        "export_prediction_from_logits",
    )
}


def digest(folder: Path, wanted: Mapping[str, tuple[str, ...]] = FUNCTIONS) -> str:
    """Digest of functions in the folder of a package, nnU-Net's if not told otherwise; empty when one is missing."""
    found = hashlib.sha256()
    for name, functions in wanted.items():
        try:
            source = (folder / name).read_text(encoding="utf-8")
        except OSError:
            return ""
        texts = _functions_in(source)
        if any(function not in texts for function in functions):
            return ""
        for function in functions:
            found.update(texts[function].encode())
    return found.hexdigest()


def _functions_in(source: str) -> dict[str, str]:
    """Qualified name -> source, of the functions and methods of a module."""
    tree = ast.parse(source)
    lines = source.splitlines()
    texts = {}
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for item in inner:
            if isinstance(item, ast.FunctionDef):
                texts[prefix + item.name] = "\n".join(
                    line.rstrip() for line in lines[item.lineno - 1 : item.end_lineno]
                )
    return texts


@cache
def totalsegmentator() -> bool:
    """Whether a TotalSegmentator is installed whose functions are known."""
    spec = find_spec("totalsegmentator")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return bool(places) and digest(Path(places[0]), TOTALSEGMENTATORS) in TOTALSEGMENTATOR.values()


@cache
def refusal() -> str | None:
    """Say why the installed nnU-Net is not one that lean prediction was written against; None when it is."""
    spec = find_spec("nnunetv2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        return "nnunetv2 is not installed"
    if digest(Path(places[0])) in KNOWN.values():
        return None
    try:
        number = version("nnunetv2")
    except PackageNotFoundError:
        number = "of unknown version"
    return f"the inference functions of nnunetv2 {number} are not those of {' or '.join(KNOWN)}"

"""What our trainers say when nnU-Net cannot split a dataset into its five folds."""

from __future__ import annotations


class SplitErrorMixin:
    """Goes before ``nnUNetTrainer`` in a trainer's bases."""

    def do_split(self) -> tuple[list[str], list[str]]:
        """Refuse what nnU-Net's five-fold split cannot do with a one-line way out; else as in stock."""
        try:
            return super().do_split()  # type: ignore[misc]
        except ValueError as error:
            fold, cases = self.fold, self.dataset_json.get("numTraining")  # type: ignore[attr-defined]
            raise ValueError(
                f"fold {fold} needs a split, and nnU-Net's has five folds for {cases} training cases: train with fold "
                f"`all`, or write {self.preprocessed_dataset_folder_base}/splits_final.json. ({error})"  # type: ignore[attr-defined]
            ) from error

"""Settings of nnU-Net for tests in this process, read when it is imported: two workers, as many threads in exports."""

from __future__ import annotations

import os

os.environ.setdefault("nnUNet_def_n_proc", "2")
for _folder in ("raw", "preprocessed", "results"):  # it warns when they are not set; tests name their own
    os.environ.setdefault(f"nnUNet_{_folder}", os.devnull)

"""Bundles run in the test process: what they set for the whole process is set back."""

from tests.bundles.conftest import _restore_torchs_global_state, defective  # noqa: F401

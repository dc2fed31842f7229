"""`python -m nnunet_plugins predict`: nnU-Net's prediction command with lean prediction on."""

from __future__ import annotations

import sys

from nnunet_plugins.lean.cases.failures import PredictionError, one_line
from nnunet_plugins.lean.stock import PREDICTOR, stock
from nnunet_plugins.lean.switch import lean_prediction, refusal


def run(arguments: list[str]) -> int:
    """Predict with the arguments of nnU-Net's commands; returns the exit status (see ``nnunet_plugins.__main__``)."""
    reason = refusal()
    if reason is not None:
        print(f"lean prediction is not possible: {reason}.", file=sys.stderr)
        return 2
    name = "predict_entry_point_modelfolder" if "-m" in arguments else "predict_entry_point"
    before, sys.argv = sys.argv, ["python -m nnunet_plugins predict", *arguments]
    try:
        with lean_prediction():
            stock(PREDICTOR, name)()
    except PredictionError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        print(one_line(error), file=sys.stderr)
        return 2
    finally:
        sys.argv = before
    return 0

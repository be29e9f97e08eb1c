"""Importing libraries without what they, and the libraries behind them, report.

diffusers and LyCORIS import every quantiser that is installed, used or not, and these warn: of
kernels that are not there, of versions that do not fit. None of it concerns what is done here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Within it nothing below an error is logged, and nothing is warned of."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

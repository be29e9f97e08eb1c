"""Importing diffusers or LyCORIS without what the libraries behind them report.

Both import every quantiser that is installed, used or not, and these log warnings of their own:
kernels that are not there, versions that do not fit. None of it concerns what is done here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Within it nothing below an error is logged."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

"""The bins of t in which a run's metrics count losses. Imports no torch.

They are of equal mass under the logit-normal t of training: each holds as many rows as the others.
"""

from __future__ import annotations

import math
from statistics import NormalDist

#: Number of bins of t.
BINS = 8


def _time(share: float) -> float:
    """The t below which `share` of the logit-normal times lie."""
    return 1 / (1 + math.exp(-NormalDist().inv_cdf(share)))


#: The t between one bin and the next; a t that equals one belongs to the upper bin.
EDGES = tuple(_time(k / BINS) for k in range(1, BINS))
#: The median t of each bin.
CENTRES = tuple(_time((k + 0.5) / BINS) for k in range(BINS))

"""Modification times, and when one can be trusted to tell two states of a file apart."""

from __future__ import annotations

#: A file may change once more within the granularity of its modification time, which is two
#: seconds on FAT. What was read so soon after it was modified is read again (nanoseconds).
RACY_NS = 2_000_000_000

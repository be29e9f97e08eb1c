"""On what a run is computed: where any of it is another, losses may differ in their last bits."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Packages on which the numbers of a run depend.
_PACKAGES = (
    "omnigen-pipe",
    "torch",
    "diffusers",
    "lycoris-lora",
    "numpy",
    "schedulefree",
    "prodigyopt",
    "lion-pytorch",
    "bitsandbytes",
    "torchao",
    "optimum-quanto",
)


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on: losses are equal only where these are."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # the quantisers are a choice
            found[name] = version(name)
    return found


def processor() -> str:
    """The name of this machine's processor, as the system has it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

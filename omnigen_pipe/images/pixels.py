"""From a file's bytes and a geometry to the pixels that the VAE gets."""

from __future__ import annotations

from omnigen_pipe.config import PixelsConfig

#: Raised whenever the same bytes and geometry would give other pixels.
PIXELS_VERSION = 1


def policy(config: PixelsConfig) -> str:
    """A text that differs whenever the same bytes and geometry would give other pixels."""
    return f"v{PIXELS_VERSION} {config.decode} lanczos srgb {config.alpha_background}"

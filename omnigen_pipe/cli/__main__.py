"""`python -m omnigen_pipe.cli`, which torchrun starts: the same as `omnigen-pipe`."""

from __future__ import annotations

from omnigen_pipe.cli import main

if __name__ == "__main__":
    main()

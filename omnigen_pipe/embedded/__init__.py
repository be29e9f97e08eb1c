"""The embedded model, and how it was made: `python -m omnigen_pipe.embedded.make`."""

"""One module per command, each of which reads as its own summary."""

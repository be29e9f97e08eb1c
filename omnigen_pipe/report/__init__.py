"""The report of `inspect`: what a workspace or a run holds, as one HTML file."""

"""The little world of drawn pictures that the embedded model knows."""

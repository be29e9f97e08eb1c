"""The demo: the embedded model is taught a shape that it has never seen, and is judged by it."""

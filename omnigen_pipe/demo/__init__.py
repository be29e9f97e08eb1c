"""A small model and drawn pictures, for the demo and the tests."""

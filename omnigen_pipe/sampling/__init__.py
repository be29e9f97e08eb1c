"""Sampling: pictures drawn by the model, from a prompt and a seed each."""

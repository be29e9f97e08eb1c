"""Exports: an adapter merged into its base model, written as others read models."""

"""OmniGen itself: loading, attention, positions, objective, adapter."""

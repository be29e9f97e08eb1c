"""From frozen samples to an adapter."""

"""Care of a workspace: what is checked, repaired and cleared away between runs."""

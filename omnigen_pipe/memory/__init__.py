"""What training will need of a GPU's memory, traced without a GPU and without weights."""

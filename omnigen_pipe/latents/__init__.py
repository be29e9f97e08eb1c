"""From pixels to published shards of VAE posteriors."""

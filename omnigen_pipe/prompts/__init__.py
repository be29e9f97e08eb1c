"""From captions to token ids in OmniGen's template."""

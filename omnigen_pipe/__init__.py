"""omnigen-pipe: from captioned images to LoKr adapters of OmniGen-v1."""

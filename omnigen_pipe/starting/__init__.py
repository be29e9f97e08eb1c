"""How a workspace begins: its commented configuration, from answers or from SimpleTuner's files."""

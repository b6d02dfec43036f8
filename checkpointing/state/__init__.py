"""Live training state as named ranges: the bridge between an optimizer and checkpointing."""

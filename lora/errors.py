"""The error users see from adapters (no torch here)."""


class AdapterError(ValueError):
    """An adapter cannot be attached, trained, saved or loaded; says which one and what to do."""

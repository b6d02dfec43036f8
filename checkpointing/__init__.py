"""Capture, keep, persist and recover training state."""

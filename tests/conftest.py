"""For all tests: a slow machine is no failing property."""

from hypothesis import settings

settings.register_profile("planaria", deadline=None)
settings.load_profile("planaria")

"""From a recipe to a run: the command line, the loop and the drills."""

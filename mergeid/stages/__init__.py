"""The steps of a verb."""

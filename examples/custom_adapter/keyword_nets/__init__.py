"""Small networks that spot keywords in spectrograms."""

"""Models from what the user names: opened, built, compared."""

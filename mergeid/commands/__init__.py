"""The terminal: one file a command, derived from its verb."""

"""Files: checkpoints, headers, recipes and records, read and written whole or not at all."""

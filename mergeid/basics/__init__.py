"""What everything else stands on: reading of foreign files, nests of tensors, signals, memory."""

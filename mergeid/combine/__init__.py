"""Tensors into tensors, streamed."""

"""Closing the barrier that averaging leaves."""

"""mergeid's adapter for sentence-transformers: folders whose modules have weights of their own."""

from mergeid_sentence_transformers.adapter import SentenceTransformersAdapter

__all__ = ["SentenceTransformersAdapter"]

"""Rerankers and the parts they share."""

"""Comparisons of many rerankers under equal conditions, and the tables made from them."""

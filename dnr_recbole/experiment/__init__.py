"""Comparisons of many rerankers under equal conditions, and the tables made from them."""

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

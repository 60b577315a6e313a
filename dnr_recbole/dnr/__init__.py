"""Denoising Neural Reranker: noise, objectives, and the framework that trains any reranker with them."""

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

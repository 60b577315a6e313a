"""Denoising Neural Reranker: noise, objectives, and the framework that trains any reranker with them."""

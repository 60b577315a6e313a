"""One reranker per file; every module in this package is found by the registry."""

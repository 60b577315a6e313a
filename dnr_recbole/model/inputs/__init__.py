"""What every reranker may read beside its items: affinity to the history, retriever scores, positions."""

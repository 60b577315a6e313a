"""Parts that rerankers are made of: attention, nets, dropout, tables of items and users, evaluators of lists."""

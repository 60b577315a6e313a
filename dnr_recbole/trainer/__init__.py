"""Training of rerankers in RecBole's way."""

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

from dnr_recbole.trainer.rerank_trainer import RerankTrainer

__all__ = ["RerankTrainer"]

"""Training of rerankers in RecBole's way."""

from dnr_recbole.trainer.rerank_trainer import RerankTrainer

__all__ = ["RerankTrainer"]

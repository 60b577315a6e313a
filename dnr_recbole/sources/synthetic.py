"""A generated world whose truth is known."""

from __future__ import annotations

from dnr_recbole.data.synthetic import synthetic_rerank_data
from dnr_recbole.errors import ConfigError
from dnr_recbole.sources import Prepared, Source, register_source


@register_source("synthetic")
class Synthetic(Source):
    """The keys ``synthetic_*``; neither files nor a retriever."""

    def check(self, config) -> None:
        if config["dataset"] != "synthetic":
            raise ConfigError(f"source=synthetic needs dataset=synthetic, not {config['dataset']}")

    def prepare(self, config, shared, files=None) -> Prepared:
        return Prepared(synthetic_rerank_data(config))

"""From interactions to batches: requests, candidates, features, datasets and loaders of the second stage."""

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

"""Stage 1: retrievers, their training and calibration, and exact top-n search."""

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

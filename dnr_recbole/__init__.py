"""Neural re-ranking for two-stage recommender systems on top of RecBole."""

from dnr_recbole import compat

__version__ = "0.1.0"

# Must precede the first import of recbole, whose modules fail on recent numpy and scipy without it.
compat.apply()

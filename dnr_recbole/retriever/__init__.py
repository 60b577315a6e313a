"""Stage 1: retrievers, their training and calibration, and exact top-n search."""

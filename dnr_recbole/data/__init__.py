"""From interactions to batches: requests, candidates, features, datasets and loaders of the second stage."""

"""Rank a folder of parquet files part by part: on many machines, and on from where it stopped."""

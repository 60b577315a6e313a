"""Clicks that depend on where things were shown: click models, what to estimate of them, and values of other policies.

Nothing here knows configurations, tables or models: tensors in, tensors out.
"""

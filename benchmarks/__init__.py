"""Measurements: accuracy on manifest data sets, metrics, trivial baselines, latency and reports."""

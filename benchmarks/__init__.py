"""Measurements: accuracy on published data sets and manifests, metrics, trivial baselines, latency and reports."""

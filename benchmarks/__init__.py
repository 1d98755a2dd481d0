"""Measurements: accuracy on published data sets and manifests, metrics, trivial baselines, latency and reports.

An installed package has all of them (0.4 MB), though agvas-eval and agvas-bench need a part: setuptools leaves out whole packages, not
modules. So the makers of random checkpoints, one of which export/README.md rehearses with, and the full-size runs (0.07 MB) travel along.
"""

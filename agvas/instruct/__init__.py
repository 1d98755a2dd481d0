"""Anomaly-Instruct construction (paper §3.3, A.2): descriptions of anomaly pictures by a large multimodal model, checked and reviewed."""

"""Export: AG-VAS checkpoints to bundles of ONNX graphs, each compared with the PyTorch reference before it may be used."""

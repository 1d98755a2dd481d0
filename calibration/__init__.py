"""Calibration and quantisation of the language model and the encoders. Empty in this version: bundles are fp32, fp16 or bf16."""

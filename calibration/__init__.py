"""Calibration and quantisation: GPTQ of the language model on pictures, activation ranges for 8 bit, and the plan that keeps them."""

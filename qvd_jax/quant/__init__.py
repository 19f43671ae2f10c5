"""Quantization: the paper's mathematics, what it is compared with, and the quantized layers."""

"""Conversion of PyTorch checkpoints; the only place that knows PyTorch's names and layouts."""

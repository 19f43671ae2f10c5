"""Float definitions of the networks; they know nothing of quantization."""

"""The sampler: per-step coefficients, the step, and the loop over it."""

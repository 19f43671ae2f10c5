"""What `python -m qvd_jax.benchmark` measures, and what it is measured against."""

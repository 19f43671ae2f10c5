"""Metrics of videos as arrays: closeness to references, between sets, steadiness over time."""

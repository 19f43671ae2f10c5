"""From prompts to videos, and between pipelines and checkpoints."""

"""What is measured on videos: agreement with prompts, closeness to references, steadiness."""

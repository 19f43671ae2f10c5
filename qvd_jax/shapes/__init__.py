"""The small model's world: scenes of one moving shape, their pixels, prompts, reader, training."""

"""Products of the network, with their formulation chosen per backend and shape."""

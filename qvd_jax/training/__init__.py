"""Training: one loop for every task; a task is whatever it is given."""

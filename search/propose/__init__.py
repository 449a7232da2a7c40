"""Which points are tried, and which trainings go on: samplers and successive halving."""

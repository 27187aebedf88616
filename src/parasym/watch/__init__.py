"""A training run observed: what is recorded, where it goes, and how it is read."""

"""Batched tensor operations on views; every random draw is a function of (seed, sample)."""

"""Data: what the benchmarks are, where their images lie, what makes a batch, how it is decoded."""

"""Speed of the kernels, measured with pytest-benchmark: `pytest benchmarks`, then `python -m benchmarks.summary`."""

"""What can be read off compiled kernels without a GPU, against what was accepted.

See ``python -m benchmarks.static --help`` and docs/performance.md.
"""

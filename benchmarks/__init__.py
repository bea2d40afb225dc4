"""What the operators cost, side by side with what else computes them: ``python -m benchmarks``."""

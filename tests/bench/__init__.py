"""The benchmark: ``python -m tests.bench``. docs/benchmark.md says what it measures and what it gave."""

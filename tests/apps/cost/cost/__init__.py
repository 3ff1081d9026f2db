"""An app for benchmarks."""

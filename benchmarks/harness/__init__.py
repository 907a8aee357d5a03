"""What the benchmarks share: the models and their peers, measuring in turns, memory, reports."""

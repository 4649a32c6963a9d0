"""The four baselines as classes of the PyTorch harness: examples, and compared with PyTorch."""

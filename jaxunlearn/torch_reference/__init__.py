"""The harness in PyTorch, written from the protocol: what the package is compared with, in numbers and in speed."""

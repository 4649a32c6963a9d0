"""What decides how the package runs on a GPU, measured there in a few minutes: arms, each a process of its own."""

"""Is the forgotten class's data still in the model, example by example? Attacks that need many models."""

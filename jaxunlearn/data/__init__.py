"""Data: where the images come from, and batches of them made on the device."""

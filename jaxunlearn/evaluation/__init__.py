"""What a model is worth: its predictions, and the metrics made of them."""

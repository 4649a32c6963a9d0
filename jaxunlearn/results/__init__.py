"""What a run leaves and shows: records and tables."""

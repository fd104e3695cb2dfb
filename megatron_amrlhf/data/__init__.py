"""Reading, making, encoding and ordering of training data."""

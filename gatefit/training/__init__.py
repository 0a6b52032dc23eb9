"""One training loop for whatever decides what an image runs, and the evaluation of the result."""

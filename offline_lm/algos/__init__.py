"""One file an algorithm: what it needs of a batch, and one loss."""

"""What runs a deployed network, block by block or whole."""

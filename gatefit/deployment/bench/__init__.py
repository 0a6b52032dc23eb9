"""Timing: the original in its fastest forms beside the deployed network."""

"""A report to look at: one self-contained page and its pictures."""

"""Networks that run only what was decided for each image."""

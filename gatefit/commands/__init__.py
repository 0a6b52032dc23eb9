"""The command line: folder to folder, and what the screen shows."""

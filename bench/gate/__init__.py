"""The working tree against a commit."""

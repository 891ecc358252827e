"""The project's own numbers to reach. pyproject.toml leaves them out of what is installed."""

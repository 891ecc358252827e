"""Records for people: the terminal's table, the report's page, the README's figures."""

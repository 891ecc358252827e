"""`make gpu`: everything that only a machine with a GPU can show, in a given time, in one record."""

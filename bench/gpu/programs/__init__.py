"""What the steps of `make gpu` run, each in a process of its own."""

"""One run of the benchmarks: pytest's side, the session, and the files of rows."""

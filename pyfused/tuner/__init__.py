"""Tuning: times what a user's model calls, on the machine at hand, and keeps what was the fastest."""

"""Benchmarks of kt_async; nothing in the product imports them."""

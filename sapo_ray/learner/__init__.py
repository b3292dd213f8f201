"""Optimization: DeepSpeed ranks, and the group of them."""

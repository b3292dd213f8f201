"""Grading: answers in processes that may be killed, and the pool of them."""

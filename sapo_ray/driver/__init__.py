"""Orchestration: start with driver.py."""

"""Prompts: sources, templates, gold answers, a seeded and resumable order."""

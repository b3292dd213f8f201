"""The control plane: holds the truth about jobs and nothing about tensors. Never imports ray, torch or an engine."""

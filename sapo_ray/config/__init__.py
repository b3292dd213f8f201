"""The job: one model for file, command line and API; loading, presets, estimates."""

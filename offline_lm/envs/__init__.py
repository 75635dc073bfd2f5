"""Text sites whose every value is known exactly."""

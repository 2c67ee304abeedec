"""Configuration: settings, where they come from, what is wrong with them, and their reference."""

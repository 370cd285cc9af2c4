"""The GPT and its generation."""

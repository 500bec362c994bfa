"""The OpenAI-compatible server's own command."""

"""Perplexity on identical tokens."""

"""Tokenizers, templates, loading, adapters: everything about a checkpoint."""

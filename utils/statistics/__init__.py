"""Estimates with intervals and paired comparisons: one value a document or text, never pooled tokens. Imports nothing of ours."""

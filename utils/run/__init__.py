"""Bookkeeping of a run: artefacts, manifests, the stage contract, stopping in time. Imports no torch."""

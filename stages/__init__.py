"""The eight numbered stages; they meet through artefacts on disk only."""

"""One training loop for both arms."""

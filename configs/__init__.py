"""What an experiment is: the schema, the presets, and the loader that refuses anything else."""

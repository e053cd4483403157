"""Makes data and plans ready for pretraining."""

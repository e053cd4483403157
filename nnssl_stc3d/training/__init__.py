"""nnU-Net's training loop around pretraining methods."""

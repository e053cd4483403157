"""From preprocessed nnU-Net cases to batches of views."""

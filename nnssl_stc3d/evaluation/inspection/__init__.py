"""What a network has learnt, looked at without training anything: ``nnssl_stc3d inspect``."""

"""Self-supervised pretraining for nnU-Net v2.

Importing this package is cheap on purpose: ``nnssl_stc3d trainers`` runs in shells' start-up files.
"""

__version__ = "0.1.0"

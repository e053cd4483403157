"""The trainers that nnU-Net finds through ``nnUNet_extTrainer``; installed as ``nnssl_stc3d.trainers``.

nnU-Net imports every module of this folder as a top-level module, so modules here are thin and import absolutely.
"""

"""Network parts that pretraining methods share."""

"""The public corpora of the papers, as they lie on disk after they were downloaded and unpacked."""

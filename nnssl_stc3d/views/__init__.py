"""Views: where to look (specifications, samplers), what is seen (rendering, intensity) and how views relate."""

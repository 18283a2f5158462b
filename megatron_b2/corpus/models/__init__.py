"""Models of the corpus system that are trained here: perplexity, quality and language, dense features."""
